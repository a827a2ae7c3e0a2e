"""Which weights of a layer are kept: block patterns, single weights, packed bits, and the choice among them.

A :class:`Pattern` lists the kept blocks twice, by rows for y = x W^T and by columns for dX = dY W; both lists name the
same blocks, so no kernel needs a transposed copy of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pycse import backends, transforms
from pycse.kernels import native

BLOCKS = (16, 32, 64)
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


@dataclass
class Pattern:
    """The kept blocks of a weight (out, in).

    ``ptr`` (out/block + 1) and ``cols`` (nnz) list the block columns of each block row, ascending; ``t_ptr``
    (in/block + 1) and ``t_rows`` (nnz) the block rows of each block column, ascending. ``plan`` and ``t_plan`` say in
    which order the CPU kernels use single weights for y and for dX (:func:`_plan`); they are empty for blocks and other
    devices. All int32, on one device. ``block`` is 1 (single weights), 16, 32 or 64. ``packed`` may hold the weights
    themselves in the order of ``plan``, for y.
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
        """The pattern of a bool mask (out, in), True where a weight is kept.

        Raises:
            ValueError: ``block`` does not divide a size, or the mask is not made of whole blocks.
        """
        kept = whole_blocks(mask, block)
        if mask.numel() >= 2**31:
            raise ValueError(f"a pattern has 32-bit indices: fewer than 2**31 weights, got shape {tuple(mask.shape)}")
        rows, cols = kept.nonzero(as_tuple=True)
        t_at = cols.argsort(stable=True)  # where each kept block stands in ``cols``, in the order of columns
        plan = t_plan = cols.new_empty(0, dtype=torch.int32)
        if block == 1 and mask.device.type == "cpu" and backends.unusable("cpu") is None:
            plan = _plan(
                rows,
                cols,
                torch.arange(cols.shape[0], dtype=torch.int64, device=cols.device),
                mask.shape[0],
                mask.shape[1],
            )
            t_plan = _plan(cols[t_at], rows[t_at], t_at, mask.shape[1], mask.shape[0])
        return Pattern(
            (mask.shape[0], mask.shape[1]),
            block,
            _offsets(rows, kept.shape[0]),
            cols.int(),
            _offsets(cols, kept.shape[1]),
            rows[t_at].int(),
            plan,
            t_plan,
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


def _plan(result: Tensor, feature: Tensor, source: Tensor, results: int, features: int) -> Tensor:
    """The order in which a CPU kernel uses single weights: chunk of features by chunk, in each results with equally
    many kept weights together, fewest first, then by result.

    ``result`` and ``feature`` (nnz), sorted by result and then feature, are what each kept weight multiplies into and
    with; ``source`` says where it stands in ``Pattern.cols``. One int32 tensor, its parts one after the other:

    - lengths (chunks, chunk + 1): how many results have so many kept weights in a chunk,
    - order (chunks, results): the results,
    - source (nnz): in the order of use,
    - at (nnz), 16-bit: in the order of use, ``SPARSE_AT_STEP`` times the feature's place inside its chunk.
    """
    chunk, step = native().SPARSE_CHUNK, native().SPARSE_AT_STEP
    chunks = max(1, -(-features // chunk))
    group = feature // chunk * results + result
    many = torch.bincount(group, minlength=chunks * results).view(chunks, results)
    lengths = many.new_zeros(chunks, chunk + 1).scatter_add_(1, many, torch.ones_like(many))
    order = many.argsort(dim=1, stable=True)
    turn = order.argsort(dim=1) + torch.arange(chunks, dtype=torch.int64, device=order.device)[:, None] * results
    use = turn.flatten()[group].argsort(stable=True)
    at = F.pad((feature[use] % chunk * step).short(), (0, use.shape[0] % 2)).view(torch.int32)
    return torch.cat([*(t.flatten().int() for t in (lengths, order, source[use])), at])


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
