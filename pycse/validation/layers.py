"""Checks of sparse layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycse.validation.checks import autocast, dense, same_device, what


def linear_mask(name: str, mask: Any, weight: Tensor, *, anywhere: bool = False) -> None:
    """A bool mask of the weight's shape, on its device unless ``anywhere``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor of shape {tuple(weight.shape)}, got {what(mask)}")
    dense(name, mask)
    if mask.shape != weight.shape:
        raise ValueError(f"{name} must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    if mask.device != weight.device and not anywhere:
        raise ValueError(f"{name} must be on the weight's device {weight.device}, got {mask.device}")


def packed_mask(name: str, bits: Any, weight: Tensor, *, anywhere: bool = False) -> None:
    """pack_mask's bits of a mask of the weight's shape, on its device unless ``anywhere``."""
    shape = (weight.shape[0], -(-weight.shape[1] // 32))
    if not isinstance(bits, Tensor) or bits.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor of shape {shape}, got {what(bits)}")
    dense(name, bits)
    if bits.shape != shape:
        raise ValueError(
            f"{name} must be bits of shape {shape} (pack_mask) for a weight {tuple(weight.shape)}, got "
            f"{tuple(bits.shape)}"
        )
    if bits.device != weight.device and not anywhere:
        raise ValueError(f"{name} must be on the weight's device {weight.device}, got {bits.device}")


def linear(x: Any, weight: Any, bias: Any) -> None:
    """What F.linear needs: x (..., in), weight (out, in), bias (out); one dtype unless autocast casts them."""
    for name, t in (("x", x), ("weight", weight), *((("bias", bias),) if bias is not None else ())):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {what(t)}")
        if not t.dtype.is_floating_point or t.dtype.itemsize == 1:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {t.dtype}")
        dense(name, t)
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions (out, in), got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have the weight's {weight.shape[1]} features last, got shape {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    same_device(x, "x", weight=weight, bias=bias)
    if not autocast(x.device.type):
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None and t.dtype != x.dtype:
                raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")
