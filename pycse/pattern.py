"""Which weights of a layer are kept, as kernels take it: lists of blocks or single weights, or one bit a weight.

A :class:`Pattern` lists the kept blocks twice, by rows for y = x W^T and by columns for dX = dY W; both lists name the
same blocks, so no kernel needs a transposed copy of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycse import transforms

BLOCKS = (16, 32, 64)


@dataclass
class Pattern:
    """The kept blocks of a weight (out, in).

    ``ptr`` (out/block + 1) and ``cols`` (nnz) list the block columns of each block row, ascending; ``t_ptr``
    (in/block + 1) and ``t_rows`` (nnz) the block rows of each block column, ascending. All int32, on one device.
    ``block`` is 1 (single weights), 16, 32 or 64.

    The rest is the CPU kernels', which fill it in (pycse/backends/cpu/sparse.py): ``plan`` and ``t_plan`` (int32) say
    in which order single weights are used for y and for dX; ``packed`` may hold the weights themselves in the order of
    ``plan``. Empty for blocks and other devices.
    """

    shape: tuple[int, int]
    block: int
    ptr: Tensor
    cols: Tensor
    t_ptr: Tensor
    t_rows: Tensor
    plan: Tensor
    t_plan: Tensor
    packed: Tensor | None = None
    native: Any = None  # the CPU kernels' view of the above, once made

    @property
    def nnz(self) -> int:
        """Kept blocks."""
        return self.cols.shape[0]

    @property
    def density(self) -> float:
        """Kept weights over all weights."""
        return self.nnz * self.block**2 / max(1, self.shape[0] * self.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.ptr, self.cols, self.t_ptr, self.t_rows, self.plan, self.t_plan

    @staticmethod
    def from_mask(mask: Tensor, block: int = 1) -> Pattern:
        """The lists of a bool mask (out, in), True where a weight is kept.

        Raises:
            ValueError: ``block`` does not divide a size, or the mask is not made of whole blocks.
        """
        kept = whole_blocks(mask, block)
        if mask.numel() >= 2**31:
            raise ValueError(f"a pattern has 32-bit indices: fewer than 2**31 weights, got shape {tuple(mask.shape)}")
        rows, cols = kept.nonzero(as_tuple=True)
        none = cols.new_empty(0, dtype=torch.int32)
        return Pattern(
            (mask.shape[0], mask.shape[1]),
            block,
            _offsets(rows, kept.shape[0]),
            cols.int(),
            _offsets(cols, kept.shape[1]),
            rows[cols.argsort(stable=True)].int(),
            none,
            none,
        )

    def mask(self) -> Tensor:
        """The bool mask (out, in) again."""
        out, in_ = (size // self.block for size in self.shape)
        counts = self.ptr.long().diff()
        rows = torch.arange(out, dtype=torch.int64, device=self.ptr.device)
        rows = rows.repeat_interleave(counts, output_size=self.nnz)  # a known size, for a compiler
        kept = torch.zeros(out, in_, dtype=torch.bool, device=self.ptr.device)
        kept[rows, self.cols.long()] = True
        return kept.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)


def _offsets(index: Tensor, size: int) -> Tensor:
    """Where each of ``size`` groups starts, and where the last ends."""
    result = torch.zeros(size + 1, dtype=torch.int32, device=index.device)
    result[1:] = torch.bincount(index, minlength=size).cumsum(0)
    return result


def whole_blocks(mask: Tensor, block: int) -> Tensor:
    """Which blocks a mask keeps, (out/block, in/block); ValueError where it keeps a part of one."""
    if block == 1:
        return mask
    if block not in BLOCKS:
        raise ValueError(f"block must be 1, 16, 32 or 64, got {block!r}")
    for name, size in zip(("out_features", "in_features"), mask.shape):
        if size % block:
            raise ValueError(f"{name} must be a multiple of the block {block}, got {size} (weight {tuple(mask.shape)})")
    tiles = mask.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    kept = tiles.any(3).any(1)
    if not torch.equal(kept, tiles.all(3).all(1)):
        raise ValueError(
            f"mask must be made of whole {block} x {block} blocks for pattern 'block{block}'; "
            f"the mask of the weight {tuple(mask.shape)} keeps a part of one"
        )
    return kept


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask (out, in) as bits: int32 (out, ceil(in / 32)), bit j of word k is column 32 k + j; the rest is 0."""
    out, in_ = mask.shape
    words = -(-in_ // 32)
    if words == 0:
        return torch.zeros(out, 0, dtype=torch.int32, device=mask.device)
    padded = torch.zeros(out, words * 32, dtype=torch.uint8, device=mask.device)
    padded[:, :in_] = mask
    eight = padded.view(torch.int64)  # byte i holds 0 or 1; the product, modulo 2^64, has it in bit 56 + i
    return eight.mul_(0x0102040810204080).bitwise_right_shift_(56).to(torch.uint8).view(torch.int32)


def unpack_mask(bits: Tensor, in_features: int) -> Tensor:
    """:func:`pack_mask` undone: bool (out, in_features)."""
    if transforms.active():  # vmap has no rule for views of another type in every torch
        places = torch.arange(32, dtype=torch.int32, device=bits.device)
        return (bits[:, :, None] >> places & 1).flatten(1)[:, :in_features].bool()
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    bits = bits if bits.is_contiguous() and bits.stride(-1) == 1 else bits.clone(memory_format=torch.contiguous_format)
    each = bits.view(torch.uint8)[:, :, None] >> shifts & 1
    return each.view(bits.shape[0], bits.shape[1] * 32)[:, :in_features].bool()
