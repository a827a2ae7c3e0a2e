"""pycse::adapacse: InfoNCE with a teacher's angular margins, and in the same pass the gradients that will be needed."""

from __future__ import annotations

from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.ops.arguments import Arguments
from pycse.ops.contrastive import fake_loss
from pycse.problem import Angular, AngularNeeds
from pycse.validation import check_adapacse


def _forward(p: Angular, needs: list[bool], backend: str, validate: bool) -> tuple[Tensor | None, ...]:
    device = p.z1.device.type
    run = backends.module(backend, device, "adapacse").adapacse
    p.needs = AngularNeeds(*needs)
    if validate or device == "cpu":
        check_adapacse(p)
    temperature = p.temperature
    if backend not in backends.DIFFERENTIABLE:
        p.z1, p.z2 = fused.rows(p.z1), fused.rows(p.z2)
        p.temperature = fused.number(temperature)
        fused.contiguous(p, ("positives", "query_ids", "key_ids", "guide_queries", "guide_keys"))
    out = run(p)
    dweight = fused.in_type_of(p.weight_gradient(out.rows), p.weight) if p.needs.weight else None
    return p.reduce(out.rows), out.dz1, out.dz2, fused.in_type_of(out.dtemperature, temperature), dweight


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
