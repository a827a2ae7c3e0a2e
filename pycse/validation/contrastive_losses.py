"""Checks of the contrastive losses: each argument, which exclude each other, and what only tensors' values show."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycse import transforms
from pycse.choices import BACKEND_CHOICES, DIRECTIONS, EXCLUDE_BY, PARTITIONS, REDUCTIONS
from pycse.logits import FORMS, HARDNESS_MODES
from pycse.problem import Contrastive
from pycse.validation.checks import (
    choice,
    detached,
    embeddings,
    flag,
    matrix,
    number,
    positive_number,
    positives_are_keys,
    real,
    rows_of_keys,
    same_device,
    short,
    vector,
    weights_of,
    what,
)

# What cannot be given together, and why. The table of docs/losses.md; tests/test_bad_input.py goes through it.
EXCLUSIVE = {
    ("guides", "guide_logits"): "the logits are the guides' averaged similarities",
    ("guide_weights", "guide_logits"): "the logits are averaged already",
    ("symmetric", "guides"): "a guide speaks of rows; for columns call the loss with the sides swapped",
    ("symmetric", "guide_logits"): "a guide speaks of rows; for columns call the loss with the sides swapped",
    ("symmetric", "positives"): "a column's positive is the row of its own number",
    ("symmetric", "hard_negative_weight"): "a symmetric loss has as many keys as rows, and so no hard negatives",
    ("symmetric", "negatives"): "a column has no list of its own",
    ("symmetric", "directions"): "directions say themselves which similarities count",
    ("directions", "positives"): "document i is query i's positive",
    ("directions", "guides"): "a guide speaks of queries and documents alone",
    ("directions", "guide_logits"): "a guide speaks of queries and documents alone",
    ("directions", "negatives"): "a listed document serves the queries that list it, and no document",
}


def contrastive(
    z1: Tensor, z2: Tensor, temperature: Any, m: Any, batch: dict[str, Any], options: dict[str, Any]
) -> None:
    """What can be checked of a batch without reading a tensor's values, once its embeddings and the options are."""
    B, N = z1.shape[0], z2.shape[0]
    guides, guide_weights, guide_logits = batch["guides"], batch["guide_weights"], batch["guide_logits"]
    exclude_above, negatives, directions = batch["exclude_above"], batch["negatives"], options["directions"]
    vectors = {name: batch[name] for name in ("positives", "query_ids", "key_ids", "weight")}
    rows_of_keys(B, N, **vectors)
    if isinstance(exclude_above, Tensor):
        vector("exclude_above", exclude_above, B, "float")
    same_device(z1, z2=z2, temperature=temperature, m=m, exclude_above=exclude_above, **vectors)
    if options["normalize"]:  # else similarities may be as small as the temperature
        resolvable(
            z1, temperature, m, options["hard_negative_weight"], options["positive_margin"], options["hardness"]
        )  # fmt: skip
    guide(z1, z2, guides, guide_weights, guide_logits)
    lists(z1, negatives)
    given = {
        "symmetric": options["symmetric"],
        "hard_negative_weight": options["hard_negative_weight"] != 0,
        "directions": len(directions) > 1,
        "negatives": negatives is not None,
        "positives": batch["positives"] is not None,
        "guides": guides is not None,
        "guide_weights": guide_weights is not None,
        "guide_logits": guide_logits is not None,
    }
    for names, why in EXCLUSIVE.items() if sum(given.values()) > 1 else ():
        if given[names[0]] and given[names[1]]:
            raise ValueError(f"{' and '.join(names)} exclude each other ({why}); give one of them")
    if options["symmetric"] and N != B:
        raise ValueError(f"symmetric=True needs as many keys as rows, got z1 with {B} and z2 with {N}")
    alike = [name for name in directions if name in ("qq", "dd")]
    if options["partition"] == "per_direction" and alike:
        raise ValueError(
            f"partition='per_direction' needs directions with the positive among their similarities ('qd', 'dq'), got "
            f"{alike[0]!r}: alone, its loss would fall without end as its rows part; use partition='joint'"
        )
    if "dd" in directions and N % B != 0:
        raise ValueError(
            f"directions with 'dd' need N = (K + 1) B keys, K >= 0, which say the rows' own documents; got N = {N}, "
            f"B = {B}"
        )
    weighs_hard = options["hardness"] and options["hardness_mode"] == "hard_negatives"
    if negatives is not None:  # which are the rows' own
        return
    if (options["hard_negative_weight"] != 0 or weighs_hard) and (N % B != 0 or N == B):
        name = "hardness_mode='hard_negatives'" if weighs_hard else "hard_negative_weight"
        raise ValueError(f"{name} needs K >= 1 hard negatives a row, N = (K + 1) B keys; got N = {N}, B = {B}")
    if options["hardness"] and options["hardness_mode"] == "in_batch_negatives" and N % B != 0:
        raise ValueError(
            "hardness_mode='in_batch_negatives' needs N = (K + 1) B keys, K >= 0, which say the rows' own hard "
            f"negatives; got N = {N}, B = {B}"
        )


def contrastive_options(
    temperature: Any = 0.05,
    m: Any = 0.0,
    *,
    positive_margin: Any = 0.0,
    hard_negative_weight: Any = 0.0,
    hardness: Any = 0.0,
    hardness_mode: Any = "all_negatives",
    exclude_above: Any = None,
    exclude_by: Any = "absolute",
    guide_weights: Any = None,  # their number is the batch's
    guide_above: Any = 0.0,
    guide_by: Any = "absolute",
    symmetric: Any = False,
    directions: Any = ("qd",),
    partition: Any = "joint",
    normalize: Any = True,
    reduction: Any = "mean",
    backend: Any = "auto",
    validate: Any = False,
) -> None:
    """What does not depend on a batch."""
    real("temperature", temperature, positive=True)
    real("m", m)
    number("positive_margin", positive_margin)
    number("hard_negative_weight", hard_negative_weight)
    number("hardness", hardness)
    if hardness < 0:
        raise ValueError(f"hardness must be >= 0, got {hardness!r}")
    choice("hardness_mode", hardness_mode, HARDNESS_MODES)
    if exclude_above is not None and not isinstance(exclude_above, Tensor):
        number("exclude_above", exclude_above)
    choice("exclude_by", exclude_by, EXCLUDE_BY)
    number("guide_above", guide_above)
    choice("guide_by", guide_by, EXCLUDE_BY)
    flag("symmetric", symmetric)
    if not isinstance(directions, (list, tuple)):
        raise TypeError(f"directions must be a sequence of names, got {what(directions)}")
    for name in directions:
        choice("directions", name, DIRECTIONS)
    if "qd" not in directions or len(set(directions)) < len(directions):
        raise ValueError(f"directions must hold 'qd', and each name once, got {directions!r}")
    choice("partition", partition, PARTITIONS)
    flag("normalize", normalize)
    choice("reduction", reduction, REDUCTIONS)
    choice("backend", backend, BACKEND_CHOICES)
    flag("validate", validate)


def guide(z1: Tensor, z2: Tensor, guides: Any, weights: Any, logits: Any) -> None:
    """Guides of z1's rows and z2's keys: pairs of embeddings, or their averaged similarities."""
    if guides is None and weights is None and logits is None:
        return
    B, N = z1.shape[0], z2.shape[0]
    if logits is not None:
        matrix("guide_logits", logits, (B, N))
        detached("guide_logits", logits)
        same_device(z1, guide_logits=logits)
    if guides is None:
        if weights is not None and logits is None:
            raise ValueError("guide_weights must be given together with guides, got None")
        return
    if isinstance(guides, Tensor) or not isinstance(guides, (list, tuple)):
        raise TypeError(f"guides must be a list of pairs of embeddings, one pair (gq, gk) a guide, got {what(guides)}")
    if len(guides) == 0:
        raise ValueError("guides must hold at least one guide's embeddings, got an empty list")
    for k, pair in enumerate(guides):
        if isinstance(pair, Tensor) or not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise TypeError(f"guides[{k}] must be a pair (gq, gk) of embeddings, got {what(pair)}")
        for side, (g, n, of) in enumerate(zip(pair, (B, N), ("z1", "z2"))):
            name = f"guides[{k}][{side}]"
            embeddings(name, g)
            if g.shape[0] != n:
                raise ValueError(f"{name} must have {of}'s {n} rows, got shape {tuple(g.shape)}")
            detached(name, g)
            same_device(z1, **{name: g})
        if pair[0].shape[1] != pair[1].shape[1]:
            raise ValueError(
                f"guides[{k}] must have equal widths on both sides, got {pair[0].shape[1]} and {pair[1].shape[1]}"
            )
    weights_of("guide_weights", weights, len(guides), "guide")


def lists(z1: Tensor, negatives: Any) -> None:
    """The rows' own negatives: a pointer for each row and an end, and keys."""
    if negatives is None:
        return
    if isinstance(negatives, Tensor) or not isinstance(negatives, (list, tuple)) or len(negatives) != 2:
        raise TypeError(f"negatives must be a pair (ptr, index) of integer tensors, got {what(negatives)}")
    for name, t in zip(("negatives[0]", "negatives[1]"), negatives):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be an integer tensor, got {what(t)}")
        length = z1.shape[0] + 1 if name == "negatives[0]" else t.shape[0] if t.dim() == 1 else -1
        if length < 0:
            raise ValueError(f"{name} must have 1 dimension, got shape {tuple(t.shape)}")
        vector(name, t, length, "integer")
        if t.device.type != "cpu":
            same_device(z1, **{name: t})


def check_lists(p: Contrastive) -> None:
    """What only the lists' values show; the drivers read them anyway."""
    ptr, index = p.negatives_ptr, p.negatives_index
    if ptr is None or index is None or transforms.batched(ptr) or transforms.batched(index):
        return
    N, own = p.z2.shape[0], p.mine
    ptr, index = ptr.cpu(), index.cpu()
    steps = ptr.diff()
    if ptr[0] != 0 or (steps < 0).any() or ptr[-1] != index.shape[0]:
        raise ValueError(
            f"negatives[0] (ptr) must rise from 0 to the {index.shape[0]} entries of negatives[1], got "
            f"{short(ptr.tolist())}"
        )
    if index.shape[0] == 0:
        return
    low, high = index.min().item(), index.max().item()
    if low < 0 or high >= N:
        raise ValueError(f"negatives[1] must lie in [0, {N - 1}] (keys), got {low if low < 0 else high}")
    row = torch.repeat_interleave(steps)
    entries, counts = torch.unique(row * N + index, return_counts=True)
    if (counts > 1).any():
        twice = entries[counts > 1][0].item()
        raise ValueError(f"negatives lists key {twice % N} twice for row {twice // N}")
    rows = torch.arange(own.start, own.stop, dtype=torch.int64, device="cpu")
    of = torch.full((N,), -1, dtype=torch.int64, device="cpu")
    of[rows if p.positives is None else p.positives[own].cpu().clamp(0, N - 1)] = rows
    if (of[index] >= 0).any():
        k = int((of[index] >= 0).nonzero()[0])
        raise ValueError(
            f"negatives lists key {index[k].item()} for row {row[k].item()}, the positive of row "
            f"{of[index[k]].item()}: positives are shared by all rows, and are negatives of the others already"
        )


# Logits beyond this are noise: float32 similarities are off by 1e-7, and that over the temperature.
LARGEST_LOGIT = {torch.float64: 1e12}


def resolvable(
    z: Tensor,
    temperature: Any,
    m: Any,
    hard_negative_weight: Any = 0.0,
    positive_margin: Any = 0.0,
    hardness: Any = 0.0,
) -> None:
    """That numbers (tensors are looked at later, if at all) do not make logits which are rounding errors."""

    largest = LARGEST_LOGIT.get(z.dtype, 1e6)
    if type(temperature) is float and type(m) is float:  # as nearly always: at once
        logit = (1 + abs(m) + abs(positive_margin)) / temperature + max(hard_negative_weight, 0) + hardness
        if logit <= largest:
            return

    def value(x: Any, otherwise: float) -> Any:
        if isinstance(x, Tensor):
            return otherwise
        return x if isinstance(x, (torch.SymFloat, torch.SymInt)) else float(x)  # a symbol would be fixed

    logit = (1 + abs(value(m, 0.0)) + abs(value(positive_margin, 0.0))) / value(temperature, 1.0)
    logit = logit + max(value(hard_negative_weight, 0.0), 0) + value(hardness, 0.0)
    if logit > largest:
        raise ValueError(
            f"temperature must be larger, or m, positive_margin, hardness or hard_negative_weight smaller: "
            f"(1 + |m| + |positive_margin|) / temperature + hard_negative_weight + hardness may be {largest:g} at most "
            f"for {z.dtype} embeddings, which resolve no larger logits; it is {logit:g} (temperature={temperature!r}, "
            f"m={m!r}, positive_margin={positive_margin!r}, hard_negative_weight={hard_negative_weight!r}, "
            f"hardness={hardness!r})"
        )


def check_values(p: Contrastive) -> None:
    """What only the tensors' values show. On a GPU this waits for the device, hence only with validate=True."""
    each = p.exclude_each
    if each is not None and not transforms.batched(each) and bool(each.isnan().any()):
        raise ValueError("exclude_above must hold numbers, got NaN")
    if type(p.temperature) is float and type(p.m) is float and p.positives is None:  # as nearly always: at once
        return
    uses_m = any(t.m_over for t in FORMS[p.form].differentiable)
    tensors = (p.temperature, p.m if uses_m else None, p.positives)
    temperature, m, positives = (
        t.detach() if isinstance(t, Tensor) and not transforms.batched(t) else None for t in tensors
    )
    lowest = 1.0 if temperature is None else positive_number("temperature", temperature)
    if m is not None:
        value = m.item()
        if not math.isfinite(value):
            raise ValueError(f"m must be a finite number, got a tensor holding {value!r}")
    if (temperature is not None or m is not None) and p.normalize:
        resolvable(p.z1, lowest, 0.0 if m is None else m.item())
    positives_are_keys(positives, p.z2.shape[0])
