"""pycse::contrastive: InfoNCE and Focal-InfoNCE, and in the same pass the gradients that will be needed."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse import backends
from pycse.ops import fused
from pycse.problem import Contrastive, Needs, Result
from pycse.validation import check_values

ARGUMENTS = (
    "Tensor z1, Tensor{z2} z2, Tensor? temperature, Tensor? m, Tensor? weight, Tensor? positives, Tensor? query_ids, "
    "Tensor? key_ids, {tensors}float temperature_value, float m_value, bool focal, float hard_negative_weight, "
    "float? exclude_above, bool symmetric, bool normalize, str reduction, str backend, bool validate"
)


def compute(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | None,
    m: Tensor | None,
    weight: Tensor | None,
    positives: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature_value: float,
    m_value: float,
    focal: bool,
    hard_negative_weight: float,
    exclude_above: float | None,
    symmetric: bool,
    normalize: bool,
    reduction: str,
    backend: str,
    validate: bool,
    needs: list[bool],
) -> tuple[Contrastive, Result]:
    run = backends.module(backend, z1.device.type, "contrastive").contrastive
    if validate or z1.device.type == "cpu":
        check_values(z1, z2, temperature, m, weight, positives, focal, normalize)
    p = Contrastive(
        fused.rows(z1),
        fused.rows(z2),
        fused.value(temperature, temperature_value),
        fused.value(m, m_value),
        focal,
        None if positives is None else positives.contiguous(),
        None if query_ids is None else query_ids.contiguous(),
        None if key_ids is None else key_ids.contiguous(),
        weight,
        hard_negative_weight,
        exclude_above,
        symmetric,
        normalize,
        reduction,
        Needs(*needs),
    )
    return p, run(p)


def _forward(
    z1: Tensor, z2: Tensor, temperature: Tensor | None, m: Tensor | None, weight: Tensor | None, *rest
) -> tuple[Tensor | None, ...]:
    p, out = compute(z1, z2, temperature, m, weight, *rest)
    return (
        out.loss if out.loss is not None and p.reduction != "none" else p.reduce(out.rows),
        out.dz1,
        out.dz2,
        fused.in_type_of(out.dtemperature, temperature),
        fused.in_type_of(out.dm, m),
        fused.in_type_of(p.weight_gradient(out.rows), weight) if p.needs.weight else None,
    )


contrastive = fused.Fused(
    f"contrastive({ARGUMENTS.format(z2='', tensors='')}, bool[5] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    tensors=8,
    values=1,
    embeddings={0, 1},
)


@torch.library.register_fake("pycse::contrastive", lib=fused.library)
def _fake(z1, z2, temperature, m, weight, *args):
    reduction, needs = args[-4], args[-1]
    loss_dtype = torch.float64 if z1.dtype == torch.float64 else torch.float32
    loss = z1.new_empty(z1.shape[:1] if reduction == "none" else (), dtype=loss_dtype)
    return (loss, *fused.fake_gradients(needs, z1, z2, temperature, m, weight))


def loss(*args) -> Tensor:
    return contrastive(*args)[0]
