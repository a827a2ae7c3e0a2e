"""pycse::supervised: the losses of rows with many positives, and in the same pass the gradients that will be needed."""

from __future__ import annotations

from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.ops.arguments import Arguments
from pycse.ops.contrastive import fake_loss
from pycse.problem import Supervised, SupervisedNeeds
from pycse.validation import check_supervised


def _forward(p: Supervised, needs: list[bool], backend: str, validate: bool) -> tuple[Tensor | None, ...]:
    device = p.z1.device.type
    run = backends.module(backend, device, "supervised").supervised
    p.needs = SupervisedNeeds(*needs)
    if validate or device == "cpu":
        check_supervised(p)
    temperature = p.temperature
    if p.z2 is None:
        p.z2 = p.z1
    if backend not in backends.DIFFERENTIABLE:
        p.z1 = fused.rows(p.z1)
        p.z2 = p.z1 if p.same else fused.rows(p.z2)
        p.temperature = fused.number(temperature)
        fused.contiguous(p, ("ids1", "ids2"))
    out = run(p)
    dweight = fused.in_type_of(p.weight_gradient(out.rows), p.weight) if p.needs.weight else None
    return p.reduce(out.rows), out.dz1, out.dz2, fused.in_type_of(out.dtemperature, temperature), dweight


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
