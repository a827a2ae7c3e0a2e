"""Which pattern a layer computes with: the fastest that holds its mask, or the one that was asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pycse.kernels import native
from pycse.pattern import BLOCKS, whole_blocks

# Names that SparseLinear takes, and the side of their blocks. "2:4" and "dense" have no index.
SIDES = {"unstructured": 1, **{f"block{b}": b for b in BLOCKS}}
PATTERNS = ("auto", *SIDES, "2:4", "dense")

# Density below which a pattern's forward + backward beats F.linear: {device type: {dtype: {pattern: density}}}.
# Measured 2026-11-21 on AVX-512 cores with AMX, 2048 tokens, 768 -> 3072 and back (docs/performance.md), the worse of
# both and rounded down (not measured and taken from block32: block64 in bfloat16 without AMX, block16 and block64 in
# float64). PyTorch's bfloat16 uses AMX in all rows. A device or dtype that is not listed stays dense; float16 on the
# CPU is float32.
BREAK_EVEN: dict[str, dict[torch.dtype, dict[str, float]]] = {
    "cpu": {
        torch.float32: {"block64": 0.75, "block32": 0.8, "block16": 0.75, "unstructured": 0.3},
        torch.float64: {"block64": 0.7, "block32": 0.7, "block16": 0.65, "unstructured": 0.3},
        torch.bfloat16: {"block64": 0.12, "block32": 0.12, "block16": 0.1, "unstructured": 0.05},
    },
    "cuda": {},
}
# Blocks of 32 and 64 in AMX tiles: float32 by way of bfloat16, faster than dense with every block kept.
BREAK_EVEN["cpu with amx"] = {
    torch.float32: BREAK_EVEN["cpu"][torch.float32] | {"block64": 1.0, "block32": 1.0},
    torch.float64: BREAK_EVEN["cpu"][torch.float64],
    torch.bfloat16: BREAK_EVEN["cpu"][torch.bfloat16] | {"block64": 0.8, "block32": 0.8},
}


def break_even(device: torch.device | str, dtype: torch.dtype) -> dict[str, float]:
    """The row of :data:`BREAK_EVEN` for this machine: {pattern: density}."""
    where = torch.device(device).type
    if where == "cpu" and native().cpu_isa() == "amx":
        where = "cpu with amx"
    return BREAK_EVEN.get(where, {}).get(torch.float32 if dtype == torch.float16 else dtype, {})


class Choice(NamedTuple):
    pattern: str  # of PATTERNS, never "auto"
    reason: str


def choose(mask: Tensor, dtype: torch.dtype, device: torch.device | str) -> Choice:
    """The fastest correct pattern for a bool mask (out, in), from the measured break-even densities.

    Returns:
        ``(pattern, reason)``: "block64", "block32", "block16", "unstructured", "2:4" or "dense".
    """
    device = torch.device(device)
    density = mask.count_nonzero().item() / mask.numel() if mask.numel() else 1.0
    limits = break_even(device, dtype)
    refused = {}
    for name in ("block64", "block32", "block16"):
        try:
            whole_blocks(mask, SIDES[name])
        except ValueError as error:
            refused[name] = str(error)
            continue
        if name in limits and density < limits[name]:
            return Choice(name, f"density {density:.1%}, faster than dense below a density of {limits[name]:.0%}")
    if "unstructured" in limits and density < limits["unstructured"]:
        return Choice(
            "unstructured", f"density {density:.1%}, faster than dense below a density of {limits['unstructured']:.0%}"
        )
    if device.type == "cuda" and semi_structured_problem(mask, dtype, device) is None:
        return Choice("2:4", f"density {density:.1%}, two of four kept at most")
    where = f"{device.type} {str(dtype).removeprefix('torch.')}"
    if not limits:
        return Choice("dense", f"no sparse kernel is measured faster than dense for {where}")
    best = max(limits[name] for name in limits if name not in refused)
    why = f" ({refused['block16']})" if "block16" in refused else ""
    return Choice("dense", f"density {density:.1%}; for {where} sparse pays below a density of {best:.0%}{why}")


def semi_structured_problem(mask: Tensor, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why PyTorch's 2:4 kernels cannot take this layer; None if they can."""
    if device.type != "cuda":
        return f"2:4 runs on NVIDIA GPUs, and the layer is on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"2:4 needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"2:4 takes float16 or bfloat16, got {dtype}"
    if mask.shape[0] % 32 or mask.shape[1] % 64:
        return f"2:4 needs out_features a multiple of 32 and in_features of 64, got {tuple(mask.shape)}"
    if (mask.unflatten(1, (-1, 4)).sum(2) > 2).any():
        return "2:4 needs a mask that keeps at most two of every four weights along in_features"
    return None


def resolve(pattern: str, mask: Tensor, weight: Tensor) -> Choice:
    """The pattern named, or the one that "auto" chooses.

    Raises:
        ValueError: the mask does not fit the pattern named.
    """
    if mask.is_meta:
        return Choice("dense", "")
    if pattern == "auto":
        return choose(mask, weight.dtype, weight.device)
    if pattern in SIDES:
        whole_blocks(mask, SIDES[pattern])
    if pattern == "2:4" and (problem := semi_structured_problem(mask, weight.dtype, weight.device)):
        raise ValueError(f"pattern '2:4' cannot be used: {problem}")
    return Choice(pattern, "as asked")
