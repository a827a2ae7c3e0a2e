"""pycse::distill: DistillCSE's distillation, beside a contrastive loss where keys are given, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse import backends
from pycse.ops import contrastive, fused
from pycse.problem import Distillation, Grouping

_CONTRASTIVE = 10  # options from temperature_value to validate, after ten tensors and the teachers


def _forward(
    z1: Tensor,
    z2: Tensor | None,
    temperature: Tensor | None,
    m: Tensor | None,
    weight: Tensor | None,
    positives: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    teacher_logits: Tensor | None,
    seed: Tensor | None,
    *rest,
) -> tuple[Tensor | None, ...]:
    (
        options,
        (teachers, weights, factor, student, teacher, group, kind, value, end, shuffle, divergence, number, needs),
    ) = (
        rest[:_CONTRASTIVE],
        rest[_CONTRASTIVE:],
    )
    normalize, reduction, backend = options[6:9]
    run = backends.module(backend, z1.device.type, "distill").distill
    d = Distillation(
        fused.rows(z1),
        [fused.rows(e) for e in teachers],
        weights,
        teacher_logits,
        student,
        teacher,
        group,
        Grouping(kind, value, end),
        shuffle,
        divergence,
        number if seed is None else seed,
        factor,
        weight,
        normalize,
        reduction,
        needs[0],
    )
    dweight = lambda rows: fused.in_type_of(d.weight_gradient(rows), weight) if needs[fused.WEIGHT] else None  # noqa: E731
    if z2 is None:
        out = run(d)
        distillation = d.reduce(out.rows)
        loss = distillation * factor
        return loss, loss.new_zeros(loss.shape), distillation, out.dz1, None, None, None, dweight(out.rows * factor)

    p, other = contrastive.compute(
        z1, z2, temperature, m, weight, positives, query_ids, key_ids, *(*options, needs)
    )  # fmt: skip
    out = run(d)  # after the contrastive part, which checks the tensors' values
    distillation = d.reduce(out.rows)
    contrast = p.reduce(other.rows)
    return (
        torch.add(contrast, distillation, alpha=factor),
        contrast,
        distillation,
        None if other.dz1 is None else other.dz1.add_(out.dz1),
        other.dz2,
        fused.in_type_of(other.dtemperature, temperature),
        fused.in_type_of(other.dm, m),
        dweight(torch.add(other.rows, out.rows, alpha=factor)),
    )


distill = fused.Fused(
    f"distill({contrastive.ARGUMENTS.format(z2='?', tensors='Tensor? teacher_logits, Tensor? seed, ')}, Tensor[] teachers, "
    "float[] teacher_weights, float distill_weight, float student_temperature, float teacher_temperature, "
    "float group_temperature, str grouping, float group_value, int group_end, str shuffle, str divergence, int seed_value, "
    "bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    tensors=10,
    values=3,
    embeddings={0, 1, 20},
)


@torch.library.register_fake("pycse::distill", lib=fused.library)
def _fake(z1, z2, temperature, m, weight, *args):
    reduction, needs = args[12], args[-1]
    loss_dtype = torch.float64 if z1.dtype == torch.float64 else torch.float32
    loss = lambda: z1.new_empty(z1.shape[:1] if reduction == "none" else (), dtype=loss_dtype)  # noqa: E731
    return (loss(), loss(), loss(), *fused.fake_gradients(needs, z1, z2, temperature, m, weight))
