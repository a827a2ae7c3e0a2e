"""pycse::supervised: the losses of rows with many positives, and in the same pass the gradients that will be needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.ops.arguments import Arguments
from pycse.ops.contrastive import fake_loss
from pycse.problem import Supervised, SupervisedNeeds
from pycse.validation import check_supervised


def _forward(a: Mapping[str, Any], needs: list[bool]) -> tuple[Tensor | None, ...]:
    run = backends.module(a["backend"], a["z1"].device.type, "supervised").supervised
    p = ARGUMENTS.problem(Supervised, a, needs=SupervisedNeeds(*needs))
    if a["validate"] or p.z1.device.type == "cpu":
        check_supervised(p)
    if p.z2 is None:
        p.z2 = p.z1
    if a["backend"] not in backends.DIFFERENTIABLE:
        p.z1 = fused.rows(p.z1)
        p.z2 = p.z1 if p.same else fused.rows(p.z2)
        p.temperature = fused.number(p.temperature)
        p.ids1, p.ids2 = p.ids1.contiguous(), None if p.ids2 is None else p.ids2.contiguous()
    out = run(p)
    dweight = fused.in_type_of(p.weight_gradient(out.rows), p.weight) if p.needs.weight else None
    return p.reduce(out.rows), out.dz1, out.dz2, fused.in_type_of(out.dtemperature, a["temperature"]), dweight


ARGUMENTS = Arguments(Supervised, backend=str, validate=bool)
supervised = fused.Fused(
    "supervised",
    ARGUMENTS,
    _forward,
    lambda a: (fake_loss(a),),
    differentiable=SupervisedNeeds._fields,
    embeddings=("z1", "z2"),
)


def loss(p: Supervised, backend: str, validate: bool) -> Tensor:
    return supervised(p, backend=backend, validate=validate)[0]
