"""pycse::sigmoid: the sigmoid loss of all pairs, and in the same pass the gradients that will be needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.ops.arguments import Arguments
from pycse.ops.contrastive import fake_loss
from pycse.problem import Sigmoid, SigmoidNeeds
from pycse.validation import check_sigmoid_values


def _forward(a: Mapping[str, Any], needs: list[bool]) -> tuple[Tensor | None, ...]:
    z1, backend = a["z1"], a["backend"]
    run = backends.module(backend, z1.device.type, "sigmoid").sigmoid
    p = ARGUMENTS.problem(Sigmoid, a, needs=SigmoidNeeds(*needs))
    if a["validate"] or z1.device.type == "cpu":
        check_sigmoid_values(p)
    if backend not in backends.DIFFERENTIABLE:
        p.z1, p.z2 = fused.rows(z1), fused.rows(p.z2)
        p.scale, p.bias = fused.number(p.scale), fused.number(p.bias)
        for name in ("positives", "query_ids", "key_ids"):
            if (t := getattr(p, name)) is not None:
                setattr(p, name, t.contiguous())
    out = run(p)
    dscale, dbias = fused.in_type_of(out.dscale, a["scale"]), fused.in_type_of(out.dbias, a["bias"])
    dweight = fused.in_type_of(p.weight_gradient(out.rows), p.weight) if p.needs.weight else None
    return p.reduce(out.rows), out.dz1, out.dz2, dscale, dbias, dweight


ARGUMENTS = Arguments(Sigmoid, backend=str, validate=bool)
sigmoid = fused.Fused(
    "sigmoid",
    ARGUMENTS,
    _forward,
    lambda a: (fake_loss(a),),
    differentiable=SigmoidNeeds._fields,
    embeddings=("z1", "z2"),
)


def loss(p: Sigmoid, backend: str, validate: bool) -> Tensor:
    return sigmoid(p, backend=backend, validate=validate)[0]
