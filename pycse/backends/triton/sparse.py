"""Launches kernels/triton/sparse.py. Nothing here waits for the device or reads an index, so calls can be captured in a
CUDA graph. Single weights (block 1) become a mask of bits: gathers of them would leave the tensor cores idle."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pycse.backends.triton.contrastive import dot_kind
from pycse.backends.triton.norms import ACC, accumulation, on_device_of
from pycse.kernels.triton import sparse as kernels
from pycse.pattern import Pattern

# dW has a program for each group of kept blocks: where those are few, each multiprocessor gets this many by splitting
# tokens.
PROGRAMS_A_PROCESSOR = 3
LEAST_TOKENS = 512  # of a split: its sums are written and read once more


class Tile(NamedTuple):
    tokens: int
    wide: int  # columns of dW's tile
    masked_wide: int  # of a tile under bits, which takes registers beside the operands
    depth: int  # of a step along K
    warps: int
    stages: int


# By operand type. At most 74 KB of shared memory (90 for tf32 under bits): three programs on a multiprocessor of sm_90,
# and one fits sm_86 and sm_89. Full fp32 and fp64 have no tensor cores in Triton and hold their operands in registers.
TILES = {
    "16": Tile(128, 128, 64, 64, 4, 3),
    "tf32": Tile(128, 64, 64, 32, 4, 3),
    "ieee": Tile(64, 64, 32, 16, 4, 2),
    "fp64": Tile(32, 32, 16, 16, 4, 2),
}


WORD = 32  # bits: a step along K under bits lies in one word


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; an A100's for the interpreter's CPU tensors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108


def kind_of(dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "fp64"
    return dot_kind(dtype) if dtype == torch.float32 else "16"


def plan(a: Tensor, T: int) -> tuple[Tile, dict[str, Any]]:
    """The tile for T tokens, and what every launch takes."""
    kind = kind_of(a.dtype)
    t = TILES[kind]
    t = t._replace(tokens=max(16, min(t.tokens, triton.next_power_of_2(T))))
    precision = "tf32" if kind == "tf32" else "ieee"
    return t, dict(ACC=ACC[accumulation(a.dtype)], PRECISION=precision, num_warps=t.warps, num_stages=t.stages)


def masked_plan(a: Tensor, T: int) -> tuple[Tile, dict[str, Any]]:
    t, options = plan(a, T)
    t = t._replace(wide=t.masked_wide, depth=min(t.depth, WORD))
    return t, dict(WIDE=t.wide, DEPTH=t.depth, **options)


def bits_of(pattern: Pattern) -> Tensor:
    """pack_mask of a pattern of single weights."""
    out, words = pattern.shape[0], triton.cdiv(pattern.shape[1], 32)
    bits = torch.empty(out, words, dtype=torch.int32, device=pattern.ptr.device)
    if bits.numel():
        kernels.mark[(out,)](pattern.ptr, pattern.cols, bits, words, WORDS=32, BLOCK=32, num_warps=1)
    return bits


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    with on_device_of(x):
        if pattern.block == 1:
            return _masked(x, weight, bits_of(pattern), bias)
        (T, _), (out, _), block = x.shape, weight.shape, pattern.block
        y = x.new_empty(T, out)
        if y.numel():
            t, options = plan(x, T)
            kernels.linear[(triton.cdiv(T, t.tokens) * (out // block),)](
                x, weight, None if bias is None else bias.contiguous(), y, pattern.ptr, pattern.cols, T, out,
                x.stride(0), weight.stride(0), BLOCK=block, TOKENS=t.tokens, DEPTH=t.depth, **options,
            )  # fmt: skip
        return y


def dx(dy: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    with on_device_of(dy):
        if pattern.block == 1:
            return _masked_dx(dy, weight, bits_of(pattern))
        T, in_, block = dy.shape[0], weight.shape[1], pattern.block
        result = dy.new_empty(T, in_)
        if result.numel():
            t, options = plan(dy, T)
            kernels.dx[(triton.cdiv(T, t.tokens) * (in_ // block),)](
                dy, weight, result, pattern.t_ptr, pattern.t_rows, T, in_, dy.stride(0), weight.stride(0),
                BLOCK=block, TOKENS=t.tokens, DEPTH=t.depth, **options,
            )  # fmt: skip
        return result


def splits_of(weights: int, t: Tile, block: int, T: int, device: torch.device) -> int:
    """Of the tokens, for dW."""
    programs = max(1, weights // (block * t.wide))
    return max(1, min(PROGRAMS_A_PROCESSOR * processors(device) // programs, T // LEAST_TOKENS))


def dw(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    with on_device_of(x):
        if pattern.block == 1:
            return _masked_dw(dy, x, bits_of(pattern))
        (T, in_), out, block = x.shape, dy.shape[1], pattern.block
        result = x.new_zeros(out, in_)
        kept = pattern.nnz * block**2
        if T == 0 or kept == 0:
            return result
        t, options = plan(x, T)
        group = max(1, t.wide // block)
        splits = splits_of(kept, t, block, T, x.device)
        each = triton.cdiv(triton.cdiv(T, t.depth), splits) * t.depth
        partial = None
        if splits > 1:
            partial = torch.empty(splits, kept, dtype=accumulation(x.dtype), device=x.device)
        rows = out // block
        kernels.dw[(splits * rows * triton.cdiv(in_ // block, group),)](
            dy, x, result, partial, pattern.ptr, pattern.cols, T, out, in_, each, kept, dy.stride(0), x.stride(0),
            BLOCK=block, GROUP=group, DEPTH=t.depth, **options,
        )  # fmt: skip
        if partial is not None:
            kernels.add_splits[(pattern.nnz,)](
                partial, result, pattern.ptr, pattern.cols, splits, rows, rows.bit_length(), kept, in_,
                BLOCK=block, num_warps=4,
            )  # fmt: skip
        return result


def _masked(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    (T, in_), out = x.shape, weight.shape[0]
    y = x.new_empty(T, out)
    if y.numel():
        t, options = masked_plan(x, T)
        kernels.masked_linear[(triton.cdiv(T, t.tokens) * triton.cdiv(out, t.wide),)](
            x, weight, bits, None if bias is None else bias.contiguous(), y, T, out, in_, bits.shape[1],
            x.stride(0), weight.stride(0), TOKENS=t.tokens, **options,
        )  # fmt: skip
    return y


def _masked_dx(dy: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    (T, out), in_ = dy.shape, weight.shape[1]
    result = dy.new_empty(T, in_)
    if result.numel():
        t, options = masked_plan(dy, T)
        kernels.masked_dx[(triton.cdiv(T, t.tokens) * triton.cdiv(in_, t.wide),)](
            dy, weight, bits, result, T, out, in_, bits.shape[1], dy.stride(0), weight.stride(0),
            TOKENS=t.tokens, **options,
        )  # fmt: skip
    return result


def _masked_dw(dy: Tensor, x: Tensor, bits: Tensor) -> Tensor:
    (T, in_), out = x.shape, dy.shape[1]
    result = x.new_empty(out, in_)
    if result.numel():
        t, options = masked_plan(x, 64)
        kernels.masked_dw[(triton.cdiv(out, t.tokens) * triton.cdiv(in_, t.wide),)](
            dy, x, bits, result, T, out, in_, bits.shape[1], dy.stride(0), x.stride(0),
            HIGH=t.tokens, **options,
        )  # fmt: skip
    return result


def masked(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    with on_device_of(x):
        return _masked(x, weight, bits, bias)


def masked_dx(dy: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    with on_device_of(dy):
        return _masked_dx(dy, weight, bits)


def masked_dw(dy: Tensor, x: Tensor, bits: Tensor) -> Tensor:
    with on_device_of(x):
        return _masked_dw(dy, x, bits)
