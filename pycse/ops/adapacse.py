"""pycse::adapacse: InfoNCE with a teacher's angular margins, and in the same pass the gradients that will be needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.ops.arguments import Arguments
from pycse.ops.contrastive import fake_loss
from pycse.problem import Angular, AngularNeeds
from pycse.validation import check_adapacse


def _forward(a: Mapping[str, Any], needs: list[bool]) -> tuple[Tensor | None, ...]:
    z1, backend = a["z1"], a["backend"]
    run = backends.module(backend, z1.device.type, "adapacse").adapacse
    p = ARGUMENTS.problem(Angular, a, needs=AngularNeeds(*needs))
    if a["validate"] or z1.device.type == "cpu":
        check_adapacse(p)
    if backend not in backends.DIFFERENTIABLE:
        p.z1, p.z2 = fused.rows(z1), fused.rows(p.z2)
        p.temperature = fused.number(p.temperature)
        for name in ("positives", "query_ids", "key_ids", "guide_queries", "guide_keys"):
            if (t := getattr(p, name)) is not None:
                setattr(p, name, t.contiguous())
    out = run(p)
    dweight = fused.in_type_of(p.weight_gradient(out.rows), p.weight) if p.needs.weight else None
    return p.reduce(out.rows), out.dz1, out.dz2, fused.in_type_of(out.dtemperature, a["temperature"]), dweight


ARGUMENTS = Arguments(Angular, backend=str, validate=bool)
adapacse = fused.Fused(
    "adapacse",
    ARGUMENTS,
    _forward,
    lambda a: (fake_loss(a),),
    differentiable=AngularNeeds._fields,
    embeddings=("z1", "z2"),
)


def loss(p: Angular, backend: str, validate: bool) -> Tensor:
    return adapacse(p, backend=backend, validate=validate)[0]
