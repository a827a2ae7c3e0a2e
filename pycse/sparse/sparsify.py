"""Remove the parameters of the lowest scores from an encoder, in place.

weight  single weights               zeros under a mask (SparseLinear)
n:m     of every m weights along the input, n stay
block   square blocks of weights
head    attention heads              smaller dense layers (shrink.py)
neuron  neurons of the feed-forward parts
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pycse import validation
from pycse.sparse.choice import PATTERNS
from pycse.sparse.linear import SparseLinear
from pycse.sparse.quota import SCOPES, keep_above
from pycse.sparse.report import UNITS, LayerReport, Report
from pycse.sparse.shrink import count_owners, find_stack, group_scores, has_hooks, shrink
from pycse.sparse.storage import note, place
from pycse.sparse.views import is_sentence_transformer

GRANULARITIES = tuple(UNITS)


def sparsify(
    encoder: nn.Module,
    scores: Mapping[str, Tensor],
    sparsity: float | None = None,
    granularity: str = "weight",
    *,
    scope: str | None = None,
    n: int | None = None,
    m: int | None = None,
    block: int = 32,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    pattern: str = "auto",
) -> Report:
    """Remove the lowest-scoring share of an encoder's weights, blocks, heads or neurons, in place.

    Only nn.Linear layers lose anything: embeddings, LayerNorm and biases stay (but for the biases of neurons and heads
    that go). What ``sparsity`` is a share of is the units in the layers that are not skipped; the report names both.
    The count is exact, to the nearest unit (with scope "layer" in each layer). A group's score is the mean over its
    members.

    weight, n:m and block put a SparseLinear in the place of each layer: zeros stay zero in fine-tuning, and the mask is
    saved with the model. head and neuron cut the dense layers, and every layer keeps at least one. An optimizer made
    before must be made anew.

    Args:
        encoder: a SentenceTransformer, a transformers model, or any module with nn.Linear inside.
        scores: of `score`, or any {parameter name: tensor} for this encoder, of the parameters' shapes, any float dtype
            and device, finite; lower goes first, of equal ones the earlier.
        sparsity: share that goes, in [0, 1); n:m says it already.
        granularity: "weight", "n:m", "block", "head" or "neuron".
        scope: "global" compares all layers, "layer" takes the same share of each. Default: layer for neurons, so that
            the configuration can say how many there are; global otherwise.
        n, m: n of every m weights stay.
        block: side of a block. Layers with a size that it does not divide are skipped.
        include, exclude: patterns (fnmatch) of the names of layers, weight, n:m and block only.
        pattern: the kernel's, as in SparseLinear.from_dense.

    Returns:
        A Report: print it, or call its plot(path).

    Raises:
        ValueError, TypeError: an argument out of its range or of the wrong kind, scores of another encoder, an encoder
        with
            no layer that can lose anything. The encoder is then as it was.

    Source: An, Zhang & Song 2023 (SparseCSE, arXiv 2311.03881); blocks, heads and neurons are additions.
    """
    scope = check_arguments(encoder, sparsity, granularity, scope, n, m, block, pattern)
    check_scores(encoder, scores)
    include, exclude = patterns("include", include), patterns("exclude", exclude)
    report = Report(granularity, scope, 1 - n / m if granularity == "n:m" and n and m else float(sparsity or 0.0))
    with torch.inference_mode(False), torch.no_grad():  # whatever the caller is in, new parameters can be trained
        if granularity in ("head", "neuron"):
            if include != ("*",) or exclude:
                raise ValueError(
                    f"include and exclude are for weights and blocks; granularity {granularity!r} takes all layers"
                )
            change = plan_shrinking(encoder, scores, report)
        else:
            change = plan_masks(encoder, scores, report, include, exclude, (n, m), block, pattern)
        report.parameters_before, report.nonzero_before = count_parameters(encoder)
        change()
    report.parameters_after, report.nonzero_after = count_parameters(encoder)
    return report


def check_arguments(
    encoder: Any, sparsity: Any, granularity: Any, scope: Any, n: Any, m: Any, block: Any, pattern: Any
) -> str:
    """What can be checked without looking at layers; the scope with its default."""
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
    validation.choice("granularity", granularity, GRANULARITIES)
    validation.choice("pattern", pattern, PATTERNS)
    if scope is not None:
        validation.choice("scope", scope, SCOPES)
    if sparsity is not None:
        validation.number("sparsity", sparsity)
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), got {sparsity!r}")
    elif granularity != "n:m":
        raise ValueError(f"sparsity must be given for granularity {granularity!r}, a number in [0, 1)")
    validation.whole("block", block)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block!r}")
    if granularity == "n:m":
        for name, value in (("n", n), ("m", m)):
            if value is None:
                raise ValueError(f"{name} must be given for granularity 'n:m': n of every m weights stay")
            validation.whole(name, value)
        if not 1 <= n <= m:
            raise ValueError(f"n and m must satisfy 1 <= n <= m, got n = {n}, m = {m}")
        if sparsity is not None and abs(sparsity - (1 - n / m)) > 1e-6:
            raise ValueError(f"sparsity must be 1 - n/m = {1 - n / m:g} for {n}:{m}, or left out; got {sparsity!r}")
        if scope == "global":
            raise ValueError("scope 'global' contradicts granularity 'n:m', which has the same share everywhere")
        return "layer"
    if n is not None or m is not None:
        raise ValueError(f"n and m belong to granularity 'n:m', got granularity {granularity!r}")
    return scope or ("layer" if granularity == "neuron" else "global")


def check_scores(encoder: nn.Module, scores: Any) -> None:
    """That the scores are of this encoder, and finite."""
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores must be a mapping {{parameter name: tensor}}, got {type(scores).__name__}")
    parameters = dict(encoder.named_parameters())
    unknown = [name for name in scores if name not in parameters]
    if unknown or not scores:
        what = f"the encoder has no parameter {unknown[0]}" if unknown else "there are none"
        raise ValueError(
            f"scores must be of this encoder's parameters: {what} ({len(unknown)} of {len(scores)} unknown)"
        )
    for name, value in scores.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"scores must hold float tensors, got {type(value).__name__} for {name}")
        if value.shape != parameters[name].shape:
            raise ValueError(
                f"scores must be of this encoder's parameters: {name} has shape {tuple(parameters[name].shape)}, its "
                f"score {tuple(value.shape)}"
            )
        if value.is_meta or parameters[name].is_meta:
            raise ValueError(f"scores and parameters must hold values; {name} is on device meta")
        if not value.isfinite().all():
            raise ValueError(f"scores must be finite; those of {name} are not")


def patterns(name: str, given: Any) -> tuple[str, ...]:
    given = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(one, str) for one in given):
        raise TypeError(f"{name} must be patterns of layer names, got {given!r}")
    return given


def searched(encoder: nn.Module) -> str:
    """Prefix of the names of layers that may be replaced: of a SentenceTransformer those of its transformer, since the
    loaders of its other modules know no masks."""
    if is_sentence_transformer(encoder):
        model = getattr(encoder[0], "auto_model", None)  # type: ignore[index]
        for name, module in encoder.named_modules():
            if module is model and model is not None:
                return f"{name}."
        raise ValueError("encoder must have a transformer inside; this SentenceTransformer has none")
    return ""


def plan_masks(
    encoder: nn.Module,
    scores: Mapping[str, Tensor],
    report: Report,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    nm: tuple[Any, Any],
    block: int,
    pattern: str,
) -> Any:
    """Fill in the report's layers; a function that replaces them."""
    prefix, owners = searched(encoder), count_owners(encoder)
    chosen: list[tuple[str, nn.Linear, LayerReport]] = []
    linears = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(
            f"encoder must have nn.Linear layers to remove weights from; a {type(encoder).__name__} has none"
        )
    for name, module in linears:
        layer = LayerReport(name, tuple(module.weight.shape), module.weight.numel(), 0)
        layer.reason = refusal(name, module, scores, include, exclude, report.granularity, nm[1], block) or ""
        if not name.startswith(prefix):
            layer.reason = "outside the transformer"
        if any(owners.get(id(p), 1) > 1 for p in module.parameters()):
            layer.reason = "its weight or bias is used in more than one place"
        if not name:
            layer.reason = "it is the whole encoder, which cannot be replaced in place"
        layer.skipped = bool(layer.reason)
        report.layers.append(layer)
        if not layer.skipped:
            if f"{name}.weight" not in scores:
                raise ValueError(
                    f"scores must have one for every layer: {name}.weight is missing; score it or exclude it"
                )
            chosen.append((name, module, layer))
    if not chosen:
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in report.layers))
        raise ValueError(f"no layer of the encoder can lose weights: {reasons}")
    masks = choose(chosen, scores, report, nm, block)
    # All of them before the first takes its place: a pattern that cannot hold its mask leaves the encoder as it was.
    made = [SparseLinear.from_dense(module, mask, pattern) for (_, module, _), mask in zip(chosen, masks)]

    def change() -> None:
        for (name, _, layer), sparse in zip(chosen, made):
            place(encoder, name, sparse)
            layer.kernel, layer.reason = sparse.chosen, sparse.reason
        note(encoder.get_submodule(prefix.rstrip(".")), pattern)

    return change


def refusal(
    name: str,
    module: nn.Linear,
    scores: Mapping[str, Tensor],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    granularity: str,
    m: int | None,
    block: int,
) -> str | None:
    """Why a layer is left as it is, or None."""
    out, in_ = module.weight.shape
    if not any(fnmatchcase(name, one) for one in include):
        return "not included"
    if any(fnmatchcase(name, one) for one in exclude):
        return "excluded"
    if type(module) not in (nn.Linear, SparseLinear):
        return f"a {type(module).__name__}, not a plain nn.Linear"
    if has_hooks(module):
        return "it has hooks, which its replacement would lose"
    score = scores.get(f"{name}.weight")
    if score is not None and not score.any():
        return "all its scores are 0: the embedding does not depend on it"
    if granularity == "n:m" and m and in_ % m:
        return f"its {in_} inputs are no multiple of m = {m}"
    if granularity == "block" and (out % block or in_ % block):
        return f"its sizes {out} and {in_} are not both multiples of the block {block}"
    return None


def choose(
    chosen: list[tuple[str, nn.Linear, LayerReport]],
    scores: Mapping[str, Tensor],
    report: Report,
    nm: tuple[Any, Any],
    block: int,
) -> list[Tensor]:
    """The mask of every layer, on its device; fills in the counts and the score ranges."""
    values = [single(scores[f"{name}.weight"], module.weight.device) for name, module, _ in chosen]
    # What an earlier call removed goes first.
    gone = [~module.mask if isinstance(module, SparseLinear) else None for _, module, _ in chosen]
    if report.granularity == "n:m":
        n, m = nm
        masks = []
        for score, dead in zip(values, gone):
            score = score if dead is None else score.masked_fill(dead, -torch.inf)
            order = score.unflatten(1, (-1, m)).sort(dim=-1, descending=True, stable=True).indices
            rank = order.argsort(dim=-1)
            kept = (rank < n).flatten(1)
            masks.append(kept if dead is None else kept & ~dead)
        groups = values
    else:
        side = block if report.granularity == "block" else 1
        groups = [tiles(score, side) for score in values]
        known = [
            g if dead is None else g.masked_fill(tiles(dead.to(g.dtype), side) == 1, -torch.inf)
            for g, dead in zip(groups, gone)
        ]
        kept = keep_above([g.flatten() for g in known], report.sparsity, report.scope)
        masks = []
        for g, k, dead in zip(groups, kept, gone):
            mask = k.view_as(g).repeat_interleave(side, 0).repeat_interleave(side, 1)
            masks.append(mask if dead is None else mask & ~dead)
    for (_, _, layer), g, mask in zip(chosen, groups, masks):
        layer.kept = int(mask.sum() if g.shape == mask.shape else tiles(mask.float(), block).ceil().sum())
        layer.removed = g.numel() - layer.kept
        layer.low, layer.high = g.min().item(), g.max().item()
    return masks


def single(score: Tensor, device: torch.device) -> Tensor:
    """In float32 at least, where sums over groups do not overflow."""
    return score.detach().to(device, torch.promote_types(score.dtype, torch.float32))


def tiles(score: Tensor, side: int) -> Tensor:
    """Mean of every square block."""
    if side == 1:
        return score
    return score.unflatten(0, (-1, side)).unflatten(2, (-1, side)).mean((1, 3))


def plan_shrinking(encoder: nn.Module, scores: Mapping[str, Tensor], report: Report) -> Any:
    """Fill in the report's layers; a function that cuts them."""
    if not any(isinstance(module, nn.Linear) for module in encoder.modules()):
        raise ValueError(f"encoder must have nn.Linear layers; a {type(encoder).__name__} has none")
    stack = find_stack(encoder, report.granularity)
    missing = [
        f"{stack.prefix}{below}.{linear}.weight"
        for below, _ in stack.layers
        for linear in stack.linears(report.granularity)
        if f"{stack.prefix}{below}.{linear}.weight" not in scores
    ]
    if missing:
        raise ValueError(f"scores must have one for every layer that is cut: {missing[0]} is missing")
    device = next(stack.model.parameters()).device
    groups = group_scores(stack, {name: single(s, device) for name, s in scores.items()}, report.granularity)
    kept = keep_above(groups, report.sparsity, report.scope, least=1)
    for (below, layer), g, keep in zip(stack.layers, groups, kept):
        linear: Any = layer.get_submodule(stack.linears(report.granularity)[0])
        count = int(keep.sum())
        report.layers.append(
            LayerReport(
                f"{stack.prefix}{below}",
                tuple(linear.weight.shape),
                count,
                len(keep) - count,
                g.min().item(),
                g.max().item(),
                "dense",
                f"{linear.out_features} -> {count * linear.out_features // len(keep)} wide",
                shrunk=True,
            )
        )

    def change() -> None:
        if report.removed:
            shrink(stack, kept, report.granularity)

    return change


def count_parameters(encoder: nn.Module) -> tuple[int, int]:
    """(parameters, those that are not 0)."""
    parameters = list(encoder.parameters())
    return sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters)
