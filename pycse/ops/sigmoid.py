"""pycse::sigmoid: the sigmoid loss of all pairs, and in the same pass the gradients that will be needed."""

from __future__ import annotations

from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.ops.arguments import Arguments
from pycse.ops.contrastive import fake_loss
from pycse.problem import Sigmoid, SigmoidNeeds
from pycse.validation import check_sigmoid_values


def _forward(p: Sigmoid, needs: list[bool], backend: str, validate: bool) -> tuple[Tensor | None, ...]:
    device = p.z1.device.type
    run = backends.module(backend, device, "sigmoid").sigmoid
    p.needs = SigmoidNeeds(*needs)
    if validate or device == "cpu":
        check_sigmoid_values(p)
    scale, bias = p.scale, p.bias
    if backend not in backends.DIFFERENTIABLE:
        p.z1, p.z2 = fused.rows(p.z1), fused.rows(p.z2)
        p.scale, p.bias = fused.number(scale), fused.number(bias)
        fused.contiguous(p, ("positives", "query_ids", "key_ids"))
    out = run(p)
    dscale, dbias = fused.in_type_of(out.dscale, scale), fused.in_type_of(out.dbias, bias)
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
