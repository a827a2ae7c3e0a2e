"""pycse::matryoshka: a contrastive loss at several lengths of the embeddings, and in the same pass their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.ops.arguments import Arguments
from pycse.ops.contrastive import computed, fake_loss
from pycse.panels import prefixes
from pycse.problem import Contrastive, Lengths, Needs, Result


def _forward(
    p: Contrastive, lengths: Lengths, needs: list[bool], backend: str, validate: bool
) -> tuple[Tensor | None, ...]:
    device, losses = p.z1.device.type, p.z1
    contrastive = backends.module(backend, device, "contrastive")
    name = contrastive.__name__.split(".")[2]
    kernels = None if backends.lacks(name, "prefixes") else backends.module(name, device, "prefixes").Kernels

    def run(p: Contrastive) -> Result:
        nonlocal losses
        out, losses = prefixes.matryoshka(p, lengths, contrastive.contrastive, kernels, name in backends.DIFFERENTIABLE)
        return out

    out = computed(p, needs, backend, validate, run)
    parts = losses.detach() * p.row_coefficients()
    parts = parts if p.reduction == "none" else parts.sum(1)
    dweight = fused.in_type_of(p.weight_gradient(out.rows), p.weight) if p.needs.weight else None
    return p.reduce(out.rows), parts, out.dz1, out.dz2, out.dtemperature, out.dm, dweight


def _fake(a: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    loss = fake_loss(a)
    return loss, loss.new_empty((len(a["dims"]), *loss.shape))


ARGUMENTS = Arguments(Contrastive, Lengths, backend=str, validate=bool)
matryoshka = fused.Fused(
    "matryoshka",
    ARGUMENTS,
    _forward,
    _fake,
    differentiable=Needs._fields,
    embeddings=("z1", "z2"),
    values=2,
)


def losses(p: Contrastive, lengths: Lengths, backend: str, validate: bool) -> tuple[Tensor, ...]:
    """The weighted sum, and each length's loss."""
    return matryoshka(p, lengths, backend=backend, validate=validate)
