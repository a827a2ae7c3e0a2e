"""pycse::uniformity and pycse::alignment, and in the same pass their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.ops.arguments import Arguments
from pycse.problem import Alignment, Uniformity


def _uniformity(p: Uniformity, needs: list[bool], backend: str) -> tuple[Tensor | None, ...]:
    run = backends.module(backend, p.z.device.type, "uniformity").uniformity
    p.need = needs[0]
    if backend not in backends.DIFFERENTIABLE:
        p.z, p.others = fused.rows(p.z), None if p.others is None else fused.rows(p.others)
    out = run(p)
    return out.loss, out.dz1


def _alignment(p: Alignment, needs: list[bool], backend: str) -> tuple[Tensor | None, ...]:
    run = backends.module(backend, p.x.device.type, "uniformity").alignment
    p.needs = (needs[0], needs[1])
    if backend not in backends.DIFFERENTIABLE:
        p.x, p.y = fused.rows(p.x), fused.rows(p.y)
    out = run(p)
    return out.loss, out.dz1, out.dz2


def _fake(z: Tensor) -> tuple[Tensor]:
    return (z.new_empty((), dtype=torch.promote_types(z.dtype, torch.float32)),)


UNIFORMITY = Arguments(Uniformity, backend=str)
ALIGNMENT = Arguments(Alignment, backend=str)
uniformity_op = fused.Fused(
    "uniformity", UNIFORMITY, _uniformity, lambda a: _fake(a["z"]), differentiable=("z",), embeddings=("z", "others")
)
alignment_op = fused.Fused(
    "alignment", ALIGNMENT, _alignment, lambda a: _fake(a["x"]), differentiable=("x", "y"), embeddings=("x", "y")
)


def uniformity(p: Uniformity, backend: str) -> Tensor:
    return uniformity_op(p, backend=backend)[0]


def alignment(p: Alignment, backend: str) -> Tensor:
    return alignment_op(p, backend=backend)[0]
