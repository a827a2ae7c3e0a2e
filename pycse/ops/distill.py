"""pycse::distill: DistillCSE's distillation, beside a contrastive loss where keys are given, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.ops.arguments import Arguments
from pycse.ops.contrastive import compute, fake_loss
from pycse.problem import Contrastive, Distillation, Needs


def _forward(
    p: Contrastive, d: Distillation, needs: list[bool], backend: str, validate: bool
) -> tuple[Tensor | None, ...]:
    need = Needs(*needs)
    run = backends.module(backend, d.z1.device.type, "distill").distill
    d.need = need.z1
    if backend not in backends.DIFFERENTIABLE:
        d.z1, d.teachers = fused.rows(d.z1), [fused.rows(e) for e in d.teachers]

    def dweight(rows: Tensor) -> Tensor | None:
        return fused.in_type_of(d.weight_gradient(rows), d.weight) if need.weight else None

    if p.z2 is None:
        out = run(d)
        distillation = d.reduce(out.rows)
        loss = distillation * d.factor
        return loss, torch.zeros_like(loss), distillation, out.dz1, None, None, None, dweight(out.rows * d.factor)

    other = compute(p, needs, backend, validate)
    out = run(d)  # after the contrastive part, which checks the tensors' values
    contrast, distillation = p.reduce(other.rows), d.reduce(out.rows)
    return (
        torch.add(contrast, distillation, alpha=d.factor),
        contrast,
        distillation,
        None if other.dz1 is None else other.dz1.add_(out.dz1),
        other.dz2,
        other.dtemperature,
        other.dm,
        dweight(torch.add(other.rows, out.rows, alpha=d.factor)),
    )


ARGUMENTS = Arguments(Contrastive, Distillation, optional=("z2",), backend=str, validate=bool)
distill = fused.Fused(
    "distill",
    ARGUMENTS,
    _forward,
    lambda a: (fake_loss(a), fake_loss(a), fake_loss(a)),
    differentiable=Needs._fields,
    embeddings=("z1", "z2", "teachers"),
    values=3,
)


def losses(p: Contrastive, d: Distillation, backend: str, validate: bool) -> tuple[Tensor, ...]:
    """The total, the contrastive part and the distillation; without keys (p.z2 None) the distillation alone."""
    return distill(p, d, backend=backend, validate=validate)
