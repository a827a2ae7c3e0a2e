"""Checks of the supervised contrastive loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycse import transforms
from pycse.choices import BACKEND_CHOICES, REDUCTIONS
from pycse.problem import Supervised
from pycse.validation.checks import (
    choice,
    embeddings,
    flag,
    positive_number,
    real,
    same_device,
    same_dtype,
    vector,
    what,
)
from pycse.validation.contrastive_losses import LARGEST_LOGIT


def supervised(
    z1: Any, ids1: Any, z2: Any, ids2: Any, temperature: Any, *, weight: Any, normalize: Any, **options: Any
) -> None:
    """Everything that can be checked without reading a tensor's values."""
    embeddings("z1", z1)
    B = z1.shape[0]
    if z2 is not None:
        embeddings("z2", z2)
        same_dtype("z1", z1, "z2", z2)
        if z2.shape[1] != z1.shape[1]:
            raise ValueError(f"z2 must have z1's {z1.shape[1]} features, got shape {tuple(z2.shape)}")
    if (z2 is None) != (ids2 is None):
        given, missing = ("z2", "ids2") if ids2 is None else ("ids2", "z2")
        raise ValueError(f"{missing} must be given together with {given} (keys and their classes), got None")
    supervised_options(temperature, normalize=normalize, **options)
    _ids("ids1", ids1, B)
    if z2 is not None:
        _ids("ids2", ids2, z2.shape[0])
    vector("weight", weight, B, "float")
    same_device(z1, z2=z2, temperature=temperature, ids1=ids1, ids2=ids2, weight=weight)
    if normalize and not isinstance(temperature, Tensor):
        resolvable(z1, temperature)


def _ids(name: str, ids: Any, length: int) -> None:
    if ids is None:
        raise TypeError(f"{name} must be an integer tensor of shape ({length},), got {what(ids)}")
    vector(name, ids, length, "integer")


def supervised_options(
    temperature: Any = 0.05,
    *,
    inside: Any = False,
    normalize: Any = True,
    reduction: Any = "mean",
    backend: Any = "auto",
    validate: Any = False,
) -> None:
    """What does not depend on a batch."""
    real("temperature", temperature, positive=True)
    flag("inside", inside)
    flag("normalize", normalize)
    choice("reduction", reduction, REDUCTIONS)
    choice("backend", backend, BACKEND_CHOICES)
    flag("validate", validate)


def resolvable(z: Tensor, temperature: Any) -> None:
    least = 1 / LARGEST_LOGIT.get(z.dtype, 1e6)
    symbol = isinstance(temperature, (torch.SymFloat, torch.SymInt))  # which float() would fix
    if (temperature if symbol else float(temperature)) < least:
        raise ValueError(
            f"temperature must be at least {least:g} for {z.dtype} embeddings, which resolve no larger logits, got "
            f"{temperature!r}"
        )


def check_supervised(p: Supervised) -> None:
    """What only the tensors' values show. On a GPU this waits for the device, hence only with validate=True."""
    if not isinstance(p.temperature, Tensor) or transforms.batched(p.temperature):
        return
    value = positive_number("temperature", p.temperature.detach())
    if p.normalize:
        resolvable(p.z1, value)
