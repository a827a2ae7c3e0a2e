"""The contrastive losses. Each validates its arguments and calls one operator. (Distillation:
pycse/distillation.py.)"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycse import matryoshka, ops, validation
from pycse.choices import DIRECTIONS
from pycse.matryoshka import MatryoshkaOutput
from pycse.problem import Contrastive, Lengths
from pycse.transforms import recordable


@recordable
def fused_focal_infonce(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.05,
    m: float | Tensor = 0.3,
    *,
    positives: Tensor | None = None,
    positive_margin: float = 0.0,
    hard_negative_weight: float = 0.0,
    hardness: float = 0.0,
    hardness_mode: str = "all_negatives",
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_above: float | Tensor | None = None,
    exclude_by: str = "absolute",
    guides: Sequence[tuple[Tensor, Tensor]] | None = None,
    guide_weights: Sequence[float] | None = None,
    guide_logits: Tensor | None = None,
    guide_above: float = 0.0,
    guide_by: str = "absolute",
    negatives: tuple[Tensor, Tensor] | None = None,
    symmetric: bool = False,
    directions: Sequence[str] = ("qd",),
    partition: str = "joint",
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    parts: bool = False,
    group: Any = None,
    exchange: str = "auto",
    replicated_keys: int = 0,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor | MatryoshkaOutput:
    r"""Focal-InfoNCE: SimCSE's contrastive loss with self-paced weights on hard negatives, without an N x N matrix.

    .. code-block:: text

        s_ij = <z1_i, z2_j> / (|z1_i| |z2_j|)
        l_ii = s_ii^2 / temperature                   the positive: easy positives weigh more
        l_ij = s_ij (s_ij + m) / temperature          negatives: hard ones weigh more
        L_i  = logsumexp_j l_ij - l_ii,    loss = mean_i L_i

    Args:
        z1: (B, D) embeddings of the queries; float32, float64, bfloat16 or float16, any scale. A row with norm
            <= 1e-12 counts as 0 and gets gradient 0; an infinite number or NaN makes the loss NaN.
        z2: (N, D) embeddings of the keys, same dtype and device. Keys beyond B are extra or hard negatives.
        temperature: > 0, no unit. A number or a 0-d float tensor, which may require grad. Where rows are normalised
            (1 + |m| + |positive_margin|) / temperature + hard_negative_weight + hardness may be 1e6 at most (1e12 for
            float64): cosines resolve no larger logits. Beyond logits of 3e8 the native kernels give NaN.
        m: hardness of the negatives. A number or a 0-d float tensor, which may require grad.
        positives: (B,) integers: row i's positive is key ``positives[i]``; by default key i, then N >= B.
        positive_margin: taken from the positive's similarity, l_i,pos - positive_margin / temperature (additive
            margin softmax, arXiv 1902.08564); > 0 makes the loss harder.
        hard_negative_weight: added (not divided by temperature) to the logits of row i's own hard negatives, keys
            k B + i for k >= 1; N = (K + 1) B. As in supervised SimCSE.
        hardness: alpha >= 0: alpha * s_ij is added to the logits of negatives (not divided by temperature), its s_ij
            not differentiated. Lan et al. 2025 (arXiv 2503.04812) use 9, EmbeddingGemma (arXiv 2509.20354) 5.
        hardness_mode: which negatives ``hardness`` weighs: "all_negatives", "in_batch_negatives" (all but the row's own
            hard negatives) or "hard_negatives" (these alone), as sentence-transformers names them.
        query_ids, key_ids: (B,) and (N,) integers. A key with the row's id that is not its positive is no negative.
        exclude_above: a number or (B,) floats d_i. A key whose s_ij is above the bound that ``exclude_by`` makes of it
            is no negative (cosine units; compared in float32, not differentiated).
        exclude_by: "absolute" s_i,pos + d_i, "relative" s_i,pos + d_i |s_i,pos|, or "constant" d_i. In a symmetric loss
            a column's bound is its own row's.
        guides: [(gq, gk), ...]: embeddings of the same rows (B, D_k) and keys (N, D_k) by other models, any width, no
            gradient. Their averaged cosines t_ij say which keys are no negatives (GISTEmbed): those with t_ij above the
            bound that ``guide_by`` makes of guide_above and t_i,pos, as ``exclude_by`` does. Products of their own, a
            panel at a time.
        guide_weights: one number >= 0 a guide, normalised to sum 1; default: equal.
        guide_logits: instead of ``guides``, (B, N) averaged cosines made elsewhere.
        guide_above, guide_by: GISTEmbed's margin is -guide_above; KDMCSE's threshold is guide_by="constant".
        negatives: (ptr, index), integers (B + 1,) and (n,): the keys index[ptr[i] : ptr[i + 1]] are row i's own hard
            negatives, any number a row. A listed key serves only the rows that list it; all others are shared. They are
            the ones that hard_negative_weight and hardness_mode speak of. Costs D operations a listed key, not B D. The
            lists are read: tensors on a CPU spare a GPU the wait.
        symmetric: mean of the row and column losses; N = B and default positives only.
        directions: which similarities are in a row's sum, as MultipleNegativesRankingLoss of sentence-transformers has
            them, with z1's rows as queries q and z2's as documents d: "qd" q_i to the documents (always), "qq" to the
            other queries, "dq" the row's positive d_i to the queries (which counts the positive again, as GTE does),
            "dd" d_i to the documents but the row's own. ids and exclude_above act on each with the row's id and bound,
            hard_negative_weight and hardness on "qd" alone.
        partition: "joint" one logsumexp over all directions, or for "qd" and "dq" the mean of one loss each,
            "per_direction".
        normalize: False where rows have unit norm already; dot products outside [-1, 1] stay correct.
        weight: (B,) floats, may require grad; "mean" is then sum(w L) / sum(w).
        reduction: "mean", "sum" or "none" (the B row losses, times their weights).
        dims: the lengths of a Matryoshka loss, each once and in any order, each in [1, D]: the result is then
            sum_k dim_weights[k] L(z1[:, :dims[k]], z2[:, :dims[k]]), everything else alike at each length, thresholds
            against each length's own similarities. Features beyond the longest get gradient 0. On a CPU all lengths
            come from one loss' products, 6 B N max(dims) operations (with ``negatives`` or ``directions``, and on other
            backends, each length by itself). ``temperature`` may be one number a length, a sequence or a (K,) tensor.
        dim_weights: one number >= 0 a length; default: 1 each.
        parts: also return the losses of each length, detached: a :class:`MatryoshkaOutput`.
        group: None, or the processes that share the batch: a torch.distributed.ProcessGroup, or "world". Each rank has
            rows and keys of its own, and the other ranks' keys as negatives; positives, negatives and hard negatives (K
            the same on all ranks) are among its own keys. With W ranks "mean" gives W / sum B times the sum over the
            rank's rows (with weights W / sum w), "sum" W times it: the mean over ranks is the joined batch's loss, and
            the gradients that DDP averages are its gradients. Those of temperature and m are the ranks' mean. "none" is
            the rank's rows. Ranks call alike and differentiate alike: backward exchanges gradients (docs/scaling.md).
        exchange: how the other ranks' keys come: "gather" takes them all at once; "ring" passes them from rank to rank,
            in the memory of one rank's keys and 8 B N D operations instead of 6; "auto" gathers up to 4 GB of keys and
            gradients. Needs ``group``.
        replicated_keys: how many of z2's last keys are the same on all ranks (a queue), and count once.
        backend: "auto", "reference", "torch", "cpu", "triton" or "cuda"; see ``pycse.info()``. A named backend never
            falls back.
        validate: also check tensor values (positives, temperature, m) on a GPU, which waits for it. On a CPU they are
            always checked. Unchecked, a bad value gives NaN in its rows.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or (B,) for "none"; with ``parts`` (loss, parts), and parts
        (K,) or (K, B) in the order of ``dims``. A row left with its positive only has loss 0 (log 2 where "dq" counts
        it twice). Gradients have the inputs' dtype. Under ``torch.no_grad()`` no gradients are computed.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, named, before any work.
        RuntimeError: the backend named cannot run here; or a double backward (use backend="reference").

    ``docs/losses.md`` has a table of the arguments that exclude each other.

    Source: Hou & Li, "Improving Contrastive Learning of Sentence Embeddings with Focal-InfoNCE", Findings of EMNLP 2023
    (arXiv 2310.06918), eq. 5. The modulation is differentiated through.
    """
    batch = dict(
        positives=positives, query_ids=query_ids, key_ids=key_ids, exclude_above=exclude_above, guides=guides,
        guide_weights=guide_weights, guide_logits=guide_logits, negatives=negatives, weight=weight,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        positive_margin=positive_margin, hard_negative_weight=hard_negative_weight, hardness=hardness,
        hardness_mode=hardness_mode, exclude_by=exclude_by, guide_above=guide_above, guide_by=guide_by,
        symmetric=symmetric, directions=directions, partition=partition, normalize=normalize, reduction=reduction,
        backend=backend, validate=validate,
    )  # fmt: skip
    return loss_of(
        "fused_focal_infonce", "focal", z1, z2, temperature, m, batch, options, (dims, dim_weights, parts), group,
        exchange, replicated_keys,
    )  # fmt: skip


@recordable
def fused_infonce(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.05,
    *,
    positives: Tensor | None = None,
    positive_margin: float = 0.0,
    hard_negative_weight: float = 0.0,
    hardness: float = 0.0,
    hardness_mode: str = "all_negatives",
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_above: float | Tensor | None = None,
    exclude_by: str = "absolute",
    guides: Sequence[tuple[Tensor, Tensor]] | None = None,
    guide_weights: Sequence[float] | None = None,
    guide_logits: Tensor | None = None,
    guide_above: float = 0.0,
    guide_by: str = "absolute",
    negatives: tuple[Tensor, Tensor] | None = None,
    symmetric: bool = False,
    directions: Sequence[str] = ("qd",),
    partition: str = "joint",
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    parts: bool = False,
    group: Any = None,
    exchange: str = "auto",
    replicated_keys: int = 0,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor | MatryoshkaOutput:
    r"""InfoNCE (SimCSE's loss), without an N x N matrix.

    .. code-block:: text

        l_ij = <z1_i, z2_j> / (|z1_i| |z2_j| temperature)
        L_i  = logsumexp_j l_ij - l_ii,    loss = mean_i L_i

    Arguments, results and errors are those of :func:`fused_focal_infonce`, which differs in its logits only.

    Source: Gao, Yao & Chen, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", EMNLP 2021
    (arXiv 2104.08821), eq. 1.
    """
    batch = dict(
        positives=positives, query_ids=query_ids, key_ids=key_ids, exclude_above=exclude_above, guides=guides,
        guide_weights=guide_weights, guide_logits=guide_logits, negatives=negatives, weight=weight,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        positive_margin=positive_margin, hard_negative_weight=hard_negative_weight, hardness=hardness,
        hardness_mode=hardness_mode, exclude_by=exclude_by, guide_above=guide_above, guide_by=guide_by,
        symmetric=symmetric, directions=directions, partition=partition, normalize=normalize, reduction=reduction,
        backend=backend, validate=validate,
    )  # fmt: skip
    return loss_of(
        "fused_infonce", "infonce", z1, z2, temperature, 0.0, batch, options, (dims, dim_weights, parts), group,
        exchange, replicated_keys,
    )  # fmt: skip


def loss_of(
    name: str, form: str, z1: Any, z2: Any, temperature: Any, m: Any, batch: dict[str, Any], options: dict[str, Any],
    lengths: tuple[Any, Any, Any], group: Any, exchange: str, replicated_keys: int,
) -> Any:  # fmt: skip
    """The loss of a public function; ``lengths``: dims, dim_weights and parts."""
    if matryoshka.wanted(z1, *lengths, group):
        return at_lengths(
            name, form, z1, z2, temperature, m, batch, options, lengths, group, exchange, replicated_keys
        )  # fmt: skip
    if group is not None:
        return across(name, form, z1, z2, temperature, m, batch, options, group, exchange, replicated_keys)
    p = one_matrix(problem_of(form, z1, z2, temperature, m, batch, options))
    return ops.contrastive(p, options["backend"], options["validate"])


def at_lengths(
    name: str, form: str, z1: Any, z2: Any, temperature: Any, m: Any, batch: dict[str, Any], options: dict[str, Any],
    given: tuple[Any, Any, Any], group: Any, exchange: str, replicated_keys: int,
) -> Any:  # fmt: skip
    """The loss of a public function at several lengths; ``given``: dims, dim_weights and parts."""

    def make(z1: Any, z2: Any, **batch: Any) -> tuple[Contrastive, Lengths]:
        validation.rows_and_keys(z1, z2)
        lengths, each, one = matryoshka.lengths_of(z1.shape[1], temperature, *given)
        p = problem_of(form, z1, z2, one, m, batch, options)
        p.temperature = number_or_tensor(each)
        return p, lengths

    if group is not None:
        losses = _across(name, make, z1, z2, batch, options, group, exchange, replicated_keys)
    else:
        p, lengths = make(z1, z2, **batch)
        losses = ops.matryoshka(one_matrix(p), lengths, options["backend"], options["validate"])
    return matryoshka.output(losses, given[2])


def across(
    name: str, form: str, z1: Any, z2: Any, temperature: Any, m: Any, batch: dict[str, Any], options: dict[str, Any],
    group: Any, exchange: str, replicated_keys: int = 0,
) -> Tensor:  # fmt: skip
    """The loss of a public function over a group."""
    make = lambda z1, z2, **batch: (problem_of(form, z1, z2, temperature, m, batch, options),)  # noqa: E731
    return _across(name, make, z1, z2, batch, options, group, exchange, replicated_keys)[0]


def _across(
    name: str, make: Any, z1: Any, z2: Any, batch: dict[str, Any], options: dict[str, Any], group: Any, exchange: str,
    replicated_keys: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    from pycse import distributed  # at the first such call: it takes torch.distributed's half second

    return distributed.contrastive(
        name, make, {"z1": z1, "z2": z2, **batch}, group=group, exchange=exchange, replicated_keys=replicated_keys,
        backend=options["backend"], validate=options["validate"], paired=options["symmetric"] is True,
    )  # fmt: skip


def problem_of(
    form: str, z1: Any, z2: Any, temperature: Any, m: Any, batch: dict[str, Any], options: dict[str, Any]
) -> Contrastive:
    """The problem that a public function's arguments state, once they are checked: those of a batch and the others."""
    validation.rows_and_keys(z1, z2)
    bound = batch["exclude_above"]
    each = isinstance(bound, Tensor)
    others = {"form": form, "temperature": temperature, "m": m, "exclude_above": None if each else bound, **options}
    p = of_options(others.pop("directions"), others).copy()
    validation.contrastive(z1, z2, temperature, m, batch, options)
    p.z1, p.z2, p.weight = z1, z2, batch["weight"]
    p.positives = as_long(batch["positives"])
    p.query_ids, p.key_ids = as_long(batch["query_ids"]), as_long(batch["key_ids"])
    if each:
        p.exclude_each = bound.detach()
    if batch["guides"] is not None:
        p.guide_queries, p.guide_keys = side_by_side(batch["guides"], batch["guide_weights"])
    p.guide_logits = batch["guide_logits"]
    if batch["negatives"] is not None:
        p.negatives_ptr, p.negatives_index = (as_long(t) for t in batch["negatives"])
    return p


def one_matrix(p: Contrastive) -> Contrastive:
    """Rows and columns of one matrix as such, with fewer products. Rows' ids, and hardness on "qd", are of rows
    alone."""
    both_ways = p.partition == "per_direction" and p.directions == "qd dq" and len(p.z1) == len(p.z2)
    if both_ways and p.query_ids is None and not p.hardness:
        p.directions, p.symmetric = "qd", True
    return p


# Options whose equal values of one type mean the same, for ever: no tensors, and no symbols of torch.compile.
PLAIN = frozenset((bool, int, float, str, type(None)))


def of_options(directions: Any, others: dict[str, Any]) -> Contrastive:
    """A problem that has no batch yet, of options that are checked: once where they are plain."""
    values = tuple(others.values())
    known = type(directions) is tuple and PLAIN.issuperset(map(type, (*directions, *values)))
    make = _of_options if known and not torch.compiler.is_compiling() else _of_options.__wrapped__
    return make(directions, tuple(others), *values)


@functools.lru_cache(typed=True)
def _of_options(directions: Any, names: tuple[str, ...], *values: Any) -> Contrastive:
    options = dict(zip(names, values))
    form, temperature, m = (options.pop(name) for name in ("form", "temperature", "m"))
    output = options.pop("output", "loss")
    validation.contrastive_options(temperature, m, directions=directions, **options)
    del options["backend"], options["validate"]  # the operator's
    for name in ("positive_margin", "hard_negative_weight", "hardness", "guide_above", "exclude_above"):
        if options[name] is not None:
            options[name] = float(options[name])
    return Contrastive(
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        number_or_tensor(temperature),
        number_or_tensor(m),
        form=form,
        directions=" ".join(name for name in DIRECTIONS if name in directions),
        output=output,
        **options,
    )


@torch.no_grad()
def side_by_side(guides: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """sqrt(w_k) ghat^k along features, of rows and of keys: their product is the weighted mean of the cosines."""
    given = [1.0] * len(guides) if weights is None else [float(w) for w in weights]
    embeddings = [z for pair in guides for z in pair]
    # Similarities of 16 bits would be rounded before they are compared; a GPU's products of 16 bits are worth it.
    dtype = embeddings[0].dtype if embeddings[0].is_cuda else torch.float32
    for z in embeddings:
        dtype = torch.promote_types(dtype, z.dtype)

    def side(k: int) -> Tensor:
        units = [
            torch.nn.functional.normalize(pair[k].to(dtype), dim=1, eps=1e-12) * (w / sum(given)) ** 0.5
            for pair, w in zip(guides, given)
        ]
        return units[0] if len(units) == 1 else torch.cat(units, 1)

    return side(0), side(1)


def number_or_tensor(value: Any) -> float | Tensor:
    return value if isinstance(value, Tensor) else float(value)


def as_long(value: Tensor | None) -> Tensor | None:
    return value if value is None or value.dtype == torch.int64 else value.long()
