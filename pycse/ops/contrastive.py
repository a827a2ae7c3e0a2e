"""pycse::contrastive: the losses of one positive and many negatives, and in the same pass the gradients that will be
needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.ops.arguments import Arguments
from pycse.problem import Contrastive, Needs, Result
from pycse.validation import check_lists, check_values

# What kernels read with a stride of 1.
INDICES = (
    "positives", "query_ids", "key_ids", "guide_queries", "guide_keys", "negatives_ptr", "negatives_index",
)  # fmt: skip


def compute(p: Contrastive, needs: list[bool], backend: str, validate: bool) -> Result:
    """What the backend makes of a problem, which is made ready for it."""
    return computed(p, needs, backend, validate, backends.module(backend, p.z1.device.type, "contrastive").contrastive)


def computed(
    p: Contrastive, needs: list[bool], backend: str, validate: bool, run: Callable[[Contrastive], Result]
) -> Result:
    p.needs = Needs(*needs)
    if validate or p.z1.device.type == "cpu":
        check_values(p)
    check_lists(p)
    temperature, m = p.temperature, p.m
    if backend not in backends.DIFFERENTIABLE:
        p.z1, p.z2 = fused.rows(p.z1), fused.rows(p.z2)
        p.temperature, p.m = fused.number(temperature), fused.number(m)
        fused.contiguous(p, INDICES)
    out = run(p)
    if p.trained:
        dtemperature, dm = fused.in_type_of(out.dtemperature, temperature), fused.in_type_of(out.dm, m)
        out = out._replace(dtemperature=dtemperature, dm=dm)
    return out


def loss_of(p: Contrastive, out: Result) -> Tensor:
    return out.loss if out.loss is not None and p.reduction != "none" else p.reduce(out.rows)


def _forward(p: Contrastive, needs: list[bool], backend: str, validate: bool) -> tuple[Tensor | None, ...]:
    out = compute(p, needs, backend, validate)
    dweight = fused.in_type_of(p.weight_gradient(out.rows), p.weight) if p.needs.weight else None
    return loss_of(p, out), out.dz1, out.dz2, out.dtemperature, out.dm, dweight


def fake_loss(a: Mapping[str, Any]) -> Tensor:
    z1 = a["z1"]
    dtype = torch.float64 if z1.dtype == torch.float64 else torch.float32
    return z1.new_empty(z1.shape[:1] if a["reduction"] == "none" else (), dtype=dtype)


ARGUMENTS = Arguments(Contrastive, backend=str, validate=bool)
contrastive = fused.Fused(
    "contrastive",
    ARGUMENTS,
    _forward,
    lambda a: (fake_loss(a),),
    differentiable=Needs._fields,
    embeddings=("z1", "z2"),
)


def loss(p: Contrastive, backend: str, validate: bool) -> Tensor:
    return contrastive(p, backend=backend, validate=validate)[0]
