"""DistillCSE's public losses. Each validates its arguments and calls one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycse import matryoshka, ops, validation
from pycse.functional import at_lengths, problem_of
from pycse.matryoshka import MatryoshkaOutput
from pycse.problem import Contrastive, Distillation, Grouping
from pycse.transforms import recordable


class DistillCSEOutput(NamedTuple):
    """``loss`` is to be differentiated; the parts are detached, for logging. loss = contrastive + weight
    distillation."""

    loss: Tensor
    contrastive: Tensor
    distillation: Tensor


@recordable
def fused_distillcse(
    z1: Tensor,
    z2: Tensor,
    teachers: Sequence[Tensor] | None = None,
    temperature: float | Tensor = 0.05,
    m: float | Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_weights: Sequence[float] | None = None,
    distill_weight: float = 1.0,
    student_temperature: float = 0.025,
    teacher_temperature: float = 0.0125,
    group_temperature: float = 1.0,
    group_p: float | None = None,
    group_size: int | None = None,
    span: tuple[int, int] | None = None,
    shuffle: str = "sample",
    divergence: str = "ce",
    seed: int | Tensor | torch.Generator | None = None,
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
    symmetric: bool = False,
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    parts: bool = False,
    group: Any = None,
    backend: str = "auto",
    validate: bool = False,
) -> DistillCSEOutput:
    r"""DistillCSE: a contrastive loss plus distillation from the averaged similarities of several teachers.

    .. code-block:: text

        loss = contrastive(z1, z2) + distill_weight distillation(z1, teachers)

    ``contrastive`` is :func:`pycse.fused_infonce` (as published), or with a hardness ``m``
    :func:`pycse.fused_focal_infonce`; ``distillation`` is :func:`pycse.fused_distill` of z1.

    Args:
        z1: (B, D) embeddings of the sentences: queries of the contrastive part, and the student that is distilled.
        z2: (N, D) embeddings of the keys, as in :func:`pycse.fused_focal_infonce`.
        temperature: > 0, of the contrastive part. A number or a 0-d float tensor, which may require grad.
        m: None for InfoNCE; hardness of Focal-InfoNCE, a number or a 0-d float tensor, which may require grad.
        distill_weight: factor of the distillation in the loss.
        teachers, teacher_logits, teacher_weights, student_temperature, teacher_temperature, group_temperature, group_p,
            group_size, span, shuffle, divergence, seed: as in :func:`pycse.fused_distill`.
        positives, hard_negative_weight, query_ids, key_ids, exclude_above, symmetric: as in
            :func:`pycse.fused_focal_infonce`; they act on the contrastive part only.
        dims, dim_weights: as in :func:`pycse.fused_infonce`, of the student: teachers keep their widths, and one
            permutation serves all lengths. The distillation of each is computed by itself.
        parts: contrastive and distillation of each length, (K,) or (K, B), instead of their weighted sums.
        normalize, weight, reduction, group, backend, validate: likewise, for both parts (teachers are always
            normalised). Over a group ``contrastive`` and ``distillation`` are the rank's as well.

    Returns:
        A named tuple (loss, contrastive, distillation): 0-d, or (B,) for reduction="none"; float32, or float64 for
        float64 inputs. Only ``loss`` has gradients.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, named, before any work.
        RuntimeError: the backend named cannot run here; or a double backward (use backend="reference").

    Source: Xu et al., "DistillCSE: Distilled Contrastive Learning for Sentence Embeddings", Findings of EMNLP 2023
    (arXiv 2310.13499).
    """
    form, m = ("infonce", 0.0) if m is None else ("focal", m)
    batch: dict[str, Any] = dict(
        z1=z1, z2=z2, teachers=teachers, positives=positives, query_ids=query_ids, key_ids=key_ids,
        exclude_above=exclude_above, guides=guides, guide_weights=guide_weights, guide_logits=guide_logits,
        weight=weight,
    )  # fmt: skip
    of_pairs: dict[str, Any] = dict(
        positive_margin=positive_margin, hard_negative_weight=hard_negative_weight, hardness=hardness,
        hardness_mode=hardness_mode, exclude_by=exclude_by, guide_above=guide_above, guide_by=guide_by,
        symmetric=symmetric, directions=("qd",), partition="joint", normalize=normalize, reduction=reduction,
        backend=backend, validate=validate,
    )  # fmt: skip
    of_teachers: dict[str, Any] = dict(
        teacher_logits=teacher_logits, teacher_weights=teacher_weights, distill_weight=distill_weight,
        student_temperature=student_temperature, teacher_temperature=teacher_temperature,
        group_temperature=group_temperature, group_p=group_p, group_size=group_size, span=span, shuffle=shuffle,
        divergence=divergence, seed=seed, normalize=normalize, reduction=reduction, shared=group is not None,
    )  # fmt: skip

    if matryoshka.wanted(z1, dims, dim_weights, parts, group):
        return _at_lengths(form, batch, temperature, m, of_pairs, of_teachers, (dims, dim_weights, parts), group)

    def problems(z1: Any, z2: Any, teachers: Any, **batch: Any) -> tuple[Contrastive, Distillation]:
        p = problem_of(form, z1, z2, temperature, m, {**batch, "negatives": None}, of_pairs)
        return p, _distillation(z1, "z1", teachers, weight=batch["weight"], **of_teachers)

    if group is not None:
        from pycse import distributed

        losses: tuple[Tensor, ...] = distributed.distill(
            "fused_distillcse", problems, batch, group=group, backend=backend, validate=validate, paired=symmetric
        )  # fmt: skip
    else:
        losses = ops.distill(*problems(**batch), backend, validate)
    loss, contrastive, distillation = losses
    return DistillCSEOutput(loss, contrastive.detach(), distillation.detach())


def _at_lengths(
    form: str, batch: dict[str, Any], temperature: Any, m: Any, of_pairs: dict[str, Any], of_teachers: dict[str, Any],
    given: tuple[Any, Any, Any], group: Any,
) -> DistillCSEOutput:  # fmt: skip
    """DistillCSE at several lengths of the student; ``given``: dims, dim_weights and parts."""
    others = dict(batch)
    z1, z2, teachers = (others.pop(name) for name in ("z1", "z2", "teachers"))
    with matryoshka.on_all_ranks(z1, group):
        rows = matryoshka.filled({"z1": z1, "z2": z2, "teachers": teachers, "weight": batch["weight"]}, group)
        validation.rows_and_keys(rows["z1"], rows["z2"])
        matryoshka.lengths_of(z1.shape[1], temperature, *given)
        d = _distillation(rows["z1"], "z1", rows["teachers"], weight=rows["weight"], **of_teachers)
    if d.shuffle == "sample":
        of_teachers = of_teachers | {"seed": d.seed}  # drawn once
    contrast, contrasts = at_lengths(
        "fused_distillcse", form, z1, z2, temperature, m, {**others, "negatives": None}, of_pairs,
        (*given[:2], True), group, "gather", 0,
    )  # fmt: skip
    alike = {name: value for name, value in of_teachers.items() if name not in ("distill_weight", "shared")}
    distillation, distillations = fused_distill(
        z1, teachers, weight=batch["weight"], dims=given[0], dim_weights=given[1], parts=True, group=group,
        backend=of_pairs["backend"], **alike,
    )  # fmt: skip
    loss = contrast + d.factor * distillation
    if given[2]:
        return DistillCSEOutput(loss, contrasts, distillations)
    return DistillCSEOutput(loss, contrast.detach(), distillation.detach())


@recordable
def fused_distill(
    z: Tensor,
    teachers: Sequence[Tensor] | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_weights: Sequence[float] | None = None,
    student_temperature: float = 0.025,
    teacher_temperature: float = 0.0125,
    group_temperature: float = 1.0,
    group_p: float | None = None,
    group_size: int | None = None,
    span: tuple[int, int] | None = None,
    shuffle: str = "sample",
    divergence: str = "ce",
    seed: int | Tensor | torch.Generator | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    parts: bool = False,
    group: Any = None,
    backend: str = "auto",
) -> Tensor | MatryoshkaOutput:
    r"""Distillation of in-batch similarities from several teachers, with Group-P shuffling, without B x B x D work.

    .. code-block:: text

        s_ij = <z_i, z_j> / (|z_i| |z_j|)                       student, j != i
        t_ij = sum_k w_k <e^k_i, e^k_j> / (|e^k_i| |e^k_j|)     teachers, averaged
        p = softmax_j(s_ij / student_temperature),  q = softmax_j(t_ij / teacher_temperature), shuffled inside groups
        "ce"  L_i = -sum_j q log p     "kl"  sum_j q log(q / p)     "js"  KL(q | a) / 2 + KL(p | a) / 2, a = (p + q) / 2

    Groups are runs of the teacher's ranking (t descending): the shuffle keeps the student from copying the noise of
    close similarities.

    Args:
        z: (B, D) embeddings of the student, one view; float32, float64, bfloat16 or float16, any scale.
        teachers: sequence of (B, D_k) embeddings of the same sentences, widths and float types as they come; no
            gradient.
        teacher_logits: instead of ``teachers``, (B, B) averaged cosines made elsewhere, before any temperature. The
            diagonal is not looked at.
        teacher_weights: one number >= 0 a teacher, normalised to sum 1; default: equal.
        student_temperature, teacher_temperature: at least 1e-12, no unit.
        group_temperature: > 0: group boundaries are quantiles of softmax(t / group_temperature).
        group_p: probability mass of a group, in (0, 1]; 0.1 where no grouping is given, as published.
        group_size: instead, ranks in a group, >= 1.
        span: instead, ranks (start, end) of the only group, 0 <= start < end <= B - 1; other ranks stay in place.
        shuffle: "sample" draws one permutation inside each group; "expected" gives each member its group's mean
            probability: for "ce" the same value and gradient in expectation without the variance of the draw (for "js"
            it is another objective); "none" leaves q as it is.
        divergence: "ce" (published), "kl" or "js". The entropy in "kl" is that of the unshuffled q.
        seed: integer, 0-d int64 tensor (read by the kernel: a CUDA graph draws anew when it changes) or
            torch.Generator. The same seed gives the same permutation on every backend. Default: drawn from torch's own
            generator.
        normalize: False where rows of z have unit norm already.
        weight: (B,) floats, may require grad; "mean" is then sum(w L) / sum(w).
        reduction: "mean", "sum" or "none".
        dims, dim_weights, parts: the loss at several lengths of the student, as in :func:`pycse.fused_infonce`, by one
            permutation; each is computed by itself.
        group: None, or the processes that share the batch, as in :func:`pycse.fused_focal_infonce`: rows are shuffled
            by rank 0's seed, and alike on any number of ranks.
        backend: "auto", "reference", "torch", "cpu", "triton" or "cuda"; see ``pycse.info()``.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or (B,) for "none". With B = 1 there is no pair: loss and
        gradient are 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, named, before any work.
        RuntimeError: the backend named cannot run here; or a double backward (use backend="reference").

    Source: as :func:`fused_distillcse`, sections 3 and 4.2; "expected" is pycse's own.
    """

    if matryoshka.wanted(z, dims, dim_weights, parts, group):
        alike: dict[str, Any] = dict(
            teacher_logits=teacher_logits, teacher_weights=teacher_weights, student_temperature=student_temperature,
            teacher_temperature=teacher_temperature, group_temperature=group_temperature, group_p=group_p,
            group_size=group_size, span=span, shuffle=shuffle, divergence=divergence, normalize=normalize,
            weight=weight, reduction=reduction, group=group, backend=backend,
        )  # fmt: skip
        with matryoshka.on_all_ranks(z, group):
            validation.embeddings("z", matryoshka.filled({"z1": z}, group)["z1"])
            validation.seed(seed)
            alike["seed"] = _drawn(seed, z.device) if shuffle == "sample" else seed
        one = lambda z, *_: fused_distill(z, teachers, **alike)  # noqa: E731
        return matryoshka.summed("fused_distill", one, z, None, None, dims, dim_weights, parts, group)

    def problems(z1: Any, teachers: Any, weight: Any) -> tuple[Contrastive, Distillation]:
        validation.rows_and_choices(z1, "z", normalize, weight, reduction, backend)
        d = _distillation(
            z1, "z", teachers,
            teacher_logits=teacher_logits, teacher_weights=teacher_weights, distill_weight=1.0,
            student_temperature=student_temperature, teacher_temperature=teacher_temperature,
            group_temperature=group_temperature, group_p=group_p, group_size=group_size, span=span, shuffle=shuffle,
            divergence=divergence, seed=seed, weight=weight, normalize=normalize, reduction=reduction,
            shared=group is not None,
        )  # fmt: skip
        no_keys: Any = None
        return Contrastive(z1, no_keys, 1.0, weight=weight, normalize=normalize, reduction=reduction), d

    if group is not None:
        from pycse import distributed

        batch = dict(z1=z, teachers=teachers, weight=weight)
        return distributed.distill("fused_distill", problems, batch, group=group, backend=backend, validate=False)[0]
    return ops.distill(*problems(z, teachers, weight), backend, False)[0]


# Numbers of groups and ranks fit 32 bits: a smaller P counts as this one, a larger group as this many ranks.
SMALLEST_P, LARGEST_GROUP = 2.0**-30, 2**31 - 1


def _grouping(group_p: float | None, group_size: int | None, span: tuple[int, int] | None) -> Grouping:
    if group_size is not None:
        return Grouping("size", float(min(group_size, LARGEST_GROUP)))
    if span is not None:
        return Grouping("span", float(span[0]), int(span[1]))
    return Grouping("mass", 0.1 if group_p is None else max(float(group_p), SMALLEST_P))


def _drawn(seed: int | Tensor | torch.Generator | None, device: torch.device) -> int | Tensor:
    """The seed as a tensor that kernels read, or as a number in int64's range."""
    if isinstance(seed, Tensor):
        return seed
    if seed is None or isinstance(seed, torch.Generator):
        where = device if seed is None else seed.device
        drawn = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=where, generator=seed)
        return drawn.to(device)
    seed = seed if isinstance(seed, (int, torch.SymInt)) else int(seed)  # numpy's integers
    return seed if seed < 2**63 else seed - 2**64


def _distillation(
    z: Tensor,
    name: str,
    teachers: Any,
    *,
    teacher_logits: Tensor | None,
    teacher_weights: Any,
    distill_weight: Any,
    group_p: Any,
    group_size: Any,
    span: Any,
    seed: Any,
    weight: Tensor | None,
    normalize: bool,
    reduction: str,
    shared: bool,
    **options: Any,
) -> Distillation:
    """The problem that a public function's arguments state, once they are checked; ``name`` is the caller's for z."""
    validation.distillation(
        z, name, teachers,
        teacher_logits=teacher_logits, teacher_weights=teacher_weights, distill_weight=distill_weight, group_p=group_p,
        group_size=group_size, span=span, seed_value=seed, shared=shared, **options,
    )  # fmt: skip
    for temperature in ("student_temperature", "teacher_temperature", "group_temperature"):
        options[temperature] = float(options[temperature])
    teachers = [] if teachers is None else list(teachers)
    weights = [1.0] * len(teachers) if teacher_weights is None else [float(w) for w in teacher_weights]
    return Distillation(
        z,
        teachers,
        [w / sum(weights) for w in weights],
        teacher_logits,
        grouping=_grouping(group_p, group_size, span),
        seed=_drawn(seed, z.device) if options["shuffle"] == "sample" else 0,
        factor=float(distill_weight),
        weight=weight,
        normalize=normalize,
        reduction=reduction,
        **options,
    )
