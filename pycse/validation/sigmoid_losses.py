"""Checks of the sigmoid loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycse import transforms
from pycse.choices import BACKEND_CHOICES, REDUCTIONS
from pycse.problem import Sigmoid
from pycse.validation.checks import (
    choice,
    flag,
    positive_number,
    positives_are_keys,
    real,
    rows_and_keys,
    rows_of_keys,
    same_device,
)
from pycse.validation.contrastive_losses import LARGEST_LOGIT


def sigmoid(
    z1: Any,
    z2: Any,
    scale: Any,
    bias: Any,
    *,
    positives: Any,
    query_ids: Any,
    key_ids: Any,
    weight: Any,
    **options: Any,
) -> None:
    """Everything that can be checked without reading a tensor's values."""
    B, N = rows_and_keys(z1, z2)
    sigmoid_options(scale, bias, **options)
    given = dict(positives=positives, query_ids=query_ids, key_ids=key_ids, weight=weight)
    rows_of_keys(B, N, **given, needs_positives=False)
    same_device(z1, z2=z2, scale=scale, bias=bias, **given)
    if positives is not None and query_ids is not None:
        raise ValueError(
            "positives and query_ids exclude each other (a row's positives are one key, or the keys of its id); "
            "give one of them"
        )
    if positives is None and query_ids is None and N < B:
        raise ValueError(
            f"z2 must have at least z1's {B} rows (row i's positive is key i), got {N}; or pass positives, or "
            "query_ids and key_ids"
        )
    if options["normalize"]:  # else similarities may be as small as the scale is large
        resolvable(z1, scale, bias)


def sigmoid_options(
    scale: Any = 10.0,
    bias: Any = -10.0,
    *,
    normalize: Any = True,
    reduction: Any = "mean",
    backend: Any = "auto",
    validate: Any = False,
) -> None:
    """What does not depend on a batch."""
    real("scale", scale, positive=True)
    real("bias", bias)
    flag("normalize", normalize)
    choice("reduction", reduction, REDUCTIONS)
    choice("backend", backend, BACKEND_CHOICES)
    flag("validate", validate)


def resolvable(z: Tensor, scale: Any, bias: Any) -> None:
    """That numbers (tensors are looked at later, if at all) do not make logits which are rounding errors."""

    def value(x: Any) -> Any:
        if isinstance(x, Tensor):
            return 0.0
        return x if isinstance(x, (torch.SymFloat, torch.SymInt)) else float(x)  # a symbol would be fixed

    largest = LARGEST_LOGIT.get(z.dtype, 1e6)
    logit = abs(value(scale)) + abs(value(bias))
    if logit > largest:
        raise ValueError(
            f"scale and bias must be smaller: scale + |bias| may be {largest:g} at most for {z.dtype} embeddings, "
            f"which resolve no larger logits; it is {logit:g} (scale={scale!r}, bias={bias!r})"
        )


def check_sigmoid_values(p: Sigmoid) -> None:
    """What only the tensors' values show. On a GPU this waits for the device, hence only with validate=True."""
    scale, bias, positives = (
        t.detach() if isinstance(t, Tensor) and not transforms.batched(t) else None
        for t in (p.scale, p.bias, p.positives)
    )
    values = [p.scale, p.bias]
    if scale is not None:
        values[0] = positive_number("scale", scale)
    if bias is not None:
        values[1] = bias.item()
        if not math.isfinite(values[1]):
            raise ValueError(f"bias must be a finite number, got a tensor holding {values[1]!r}")
    if (scale is not None or bias is not None) and p.normalize:
        resolvable(p.z1, *values)
    positives_are_keys(positives, p.z2.shape[0])
