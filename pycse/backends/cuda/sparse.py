"""Launches kernels/cuda/sparse.h. Nothing here waits for the device or reads an index, so calls can be captured in a
CUDA graph. Single weights (block 1) become a mask of bits: gathers of them would leave the tensor cores idle."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pycse.backends import addresses
from pycse.backends.addresses import pointer
from pycse.backends.cuda.norms import LARGEST, Norms
from pycse.pattern import Pattern

CODES = {**addresses.CODES, torch.float16: 3}  # Storage in kernels/cuda/sparse.h
LINEAR, DX, DW = range(3)  # Which

# dW has a tile for each group of kept blocks: where those are few, each multiprocessor gets this many by splitting
# tokens.
TILES_A_PROCESSOR = 3
LEAST_TOKENS = 512  # of a split: its sums are written and read once more


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; an A100's for the emulation's CPU tensors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108


class Kernels:
    native = staticmethod(Norms.native)

    def __init__(self, a: Tensor, *sizes: int) -> None:
        if (most := max(*a.shape, *sizes)) > LARGEST:
            raise ValueError(f"backend='cuda' takes up to {LARGEST} tokens and features, not {most}")
        self.device, self.code, self.kernels = a.device, CODES[a.dtype], self.native()
        self.queue = (a.device.index, torch.cuda.current_stream(a.device).cuda_stream) if a.is_cuda else (0, 0)

    def bits(self, pattern: Pattern) -> Tensor:
        """pack_mask of a pattern of single weights."""
        out, words = pattern.shape[0], -(-pattern.shape[1] // 32)
        bits = torch.empty(out, words, dtype=torch.int32, device=self.device)
        self.kernels.mark(pointer(pattern.ptr), pointer(pattern.cols), pointer(bits), out, words, self.queue)
        return bits

    def run(
        self, which: int, shape: tuple[int, int], kept: Pattern | Tensor, a: Tensor, b: Tensor, c: Tensor,
        bias: Tensor | None = None, splits: int = 1, partial: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out, in_ = shape
        if isinstance(kept, Tensor):
            block, ptr, index, bits, words, pieces = 0, 0, 0, pointer(kept), kept.shape[1], out
        else:
            block, bits, words, pieces = kept.block, 0, 0, kept.nnz
            by = (kept.t_ptr, kept.t_rows) if which == DX else (kept.ptr, kept.cols)
            ptr, index = (pointer(t) for t in by)
        self.kernels.sparse(
            which, self.code, a.shape[0], out, in_, block, ptr, index, bits, words, pointer(a), a.stride(0), pointer(b),
            b.stride(0), pointer(bias), pointer(c), splits, pointer(partial), pieces, self.queue,
        )  # fmt: skip
        return c

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Pattern | Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        bias = None if bias is None else bias.contiguous()
        return self.run(LINEAR, (weight.shape[0], weight.shape[1]), kept, x, weight, y, bias)

    def dx(self, dy: Tensor, weight: Tensor, kept: Pattern | Tensor) -> Tensor:
        shape = weight.shape[0], weight.shape[1]
        return self.run(DX, shape, kept, dy, weight, dy.new_empty(dy.shape[0], shape[1]))

    def dw(self, dy: Tensor, x: Tensor, kept: Pattern | Tensor) -> Tensor:
        shape = out, in_ = dy.shape[1], x.shape[1]
        dw = x.new_zeros(shape)
        if x.shape[0] == 0:
            return dw
        weights = out * in_ if isinstance(kept, Tensor) else kept.nnz * kept.block**2
        splits = self.splits(weights, x.shape[0])
        partial = None
        if splits > 1:
            partial = torch.empty(
                splits, weights, dtype=torch.promote_types(x.dtype, torch.float32), device=self.device
            )
        return self.run(DW, shape, kept, dy, x, dw, None, splits, partial)

    def splits(self, weights: int, T: int) -> int:
        """Of the tokens, for dW: 64 x 128 weights to a tile, if blocks fill it."""
        tiles = max(1, weights // (64 * 128))
        return max(1, min(TILES_A_PROCESSOR * processors(self.device) // tiles, T // LEAST_TOKENS))


def start(a: Tensor, b: Tensor, kernels: type[Kernels]) -> Kernels:
    return kernels(a, *b.shape)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern, kernels: type[Kernels] = Kernels
) -> Tensor:
    k = start(x, weight, kernels)
    return k.linear(x, weight, bias, k.bits(pattern) if pattern.block == 1 else pattern)


def dx(dy: Tensor, weight: Tensor, pattern: Pattern, kernels: type[Kernels] = Kernels) -> Tensor:
    k = start(dy, weight, kernels)
    return k.dx(dy, weight, k.bits(pattern) if pattern.block == 1 else pattern)


def dw(dy: Tensor, x: Tensor, pattern: Pattern, kernels: type[Kernels] = Kernels) -> Tensor:
    k = start(dy, x, kernels)
    return k.dw(dy, x, k.bits(pattern) if pattern.block == 1 else pattern)


def masked(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, kernels: type[Kernels] = Kernels) -> Tensor:
    return start(x, weight, kernels).linear(x, weight, bias, bits)


def masked_dx(dy: Tensor, weight: Tensor, bits: Tensor, kernels: type[Kernels] = Kernels) -> Tensor:
    return start(dy, weight, kernels).dx(dy, weight, bits)


def masked_dw(dy: Tensor, x: Tensor, bits: Tensor, kernels: type[Kernels] = Kernels) -> Tensor:
    return start(dy, x, kernels).dw(dy, x, bits)
