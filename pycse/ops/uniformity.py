"""pycse::uniformity and pycse::alignment, and in the same pass their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.problem import Alignment, Uniformity


def _uniformity(z: Tensor, t: float, normalize: bool, backend: str, needs: list[bool]) -> tuple[Tensor | None, ...]:
    run = backends.module(backend, z.device.type, "uniformity").uniformity
    out = run(Uniformity(fused.rows(z), t, normalize, needs[0]))
    return out.loss, out.dz1


def _alignment(x: Tensor, y: Tensor, normalize: bool, backend: str, needs: list[bool]) -> tuple[Tensor | None, ...]:
    run = backends.module(backend, x.device.type, "uniformity").alignment
    out = run(Alignment(fused.rows(x), fused.rows(y), normalize, (needs[0], needs[1])))
    return out.loss, out.dz1, out.dz2


uniformity_op = fused.Fused(
    "uniformity(Tensor z, float t, bool normalize, str backend, bool[1] needs) -> (Tensor, Tensor)",
    _uniformity,
    tensors=1,
    values=1,
    embeddings={0},
    differentiable=1,
)
alignment_op = fused.Fused(
    "alignment(Tensor x, Tensor y, bool normalize, str backend, bool[2] needs) -> (Tensor, Tensor, Tensor)",
    _alignment,
    tensors=2,
    values=1,
    embeddings={0, 1},
    differentiable=2,
)


@torch.library.register_fake("pycse::uniformity", lib=fused.library)
def _fake_uniformity(z, t, normalize, backend, needs):
    return z.new_empty((), dtype=torch.promote_types(z.dtype, torch.float32)), *fused.fake_gradients(needs, z)


@torch.library.register_fake("pycse::alignment", lib=fused.library)
def _fake_alignment(x, y, normalize, backend, needs):
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)), *fused.fake_gradients(needs, x, y)


def uniformity(*args) -> Tensor:
    return uniformity_op(*args)[0]


def alignment(*args) -> Tensor:
    return alignment_op(*args)[0]
