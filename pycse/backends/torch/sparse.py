"""Plain PyTorch, for any device: one product for each row of blocks; single weights and bit masks by panels of rows.

Work is proportional to the kept blocks; single weights cost as much as dense, with one panel of W ⊙ M in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pycse.pattern import Pattern, unpack_mask

PANEL = 1 << 20  # weights of a dense panel


def _runs(ptr: Tensor, index: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """For each block row that keeps something: its rows, and the columns of its blocks."""
    offsets = ptr.tolist()
    inside = torch.arange(block, dtype=torch.int64, device=index.device)
    for k, (start, end) in enumerate(zip(offsets, offsets[1:])):
        if end > start:
            columns = (index[start:end].long()[:, None] * block + inside).flatten()
            yield slice(k * block, (k + 1) * block), columns


def _panels(weight: Tensor, mask: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """W ⊙ M, some rows at a time."""
    out, in_ = mask.shape
    c = max(1, PANEL // max(1, in_))
    for i in range(0, out, c):
        rows = slice(i, min(i + c, out))
        yield rows, weight[rows].masked_fill(~mask[rows], 0)


def _start(x: Tensor, out: int, bias: Tensor | None) -> Tensor:
    y = x.new_zeros(x.shape[0], out)
    return y if bias is None else y.copy_(bias)


def _wide(x: Tensor) -> torch.dtype:
    """Sums over several products are rounded once."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    if pattern.block == 1:
        return _linear(x, weight, bias, pattern.mask())
    y = _start(x, weight.shape[0], bias)
    for rows, columns in _runs(pattern.ptr, pattern.cols, pattern.block):
        y[:, rows] = F.linear(x[:, columns], weight[rows][:, columns], None if bias is None else bias[rows])
    return y


def dx(dy: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    if pattern.block == 1:
        return _dx(dy, weight, pattern.mask())
    result = dy.new_zeros(dy.shape[0], weight.shape[1])
    for columns, rows in _runs(pattern.t_ptr, pattern.t_rows, pattern.block):
        result[:, columns] = dy[:, rows] @ weight[:, columns][rows]
    return result


def dw(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    if pattern.block == 1:
        return (dy.t() @ x).masked_fill_(~pattern.mask(), 0)
    result = x.new_zeros(dy.shape[1], x.shape[1])
    for rows, columns in _runs(pattern.ptr, pattern.cols, pattern.block):
        result[rows, columns] = dy[:, rows].t() @ x[:, columns]
    return result


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows, kept in _panels(weight, mask):
        y[:, rows] = F.linear(x, kept, None if bias is None else bias[rows])
    return y


def _dx(dy: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    result = dy.new_zeros(dy.shape[0], weight.shape[1], dtype=_wide(dy))
    for rows, kept in _panels(weight, mask):
        result += dy[:, rows] @ kept
    return result.to(dy.dtype)


def masked(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, weight, bias, unpack_mask(bits, weight.shape[1]))


def masked_dx(dy: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    return _dx(dy, weight, unpack_mask(bits, weight.shape[1]))


def masked_dw(dy: Tensor, x: Tensor, bits: Tensor) -> Tensor:
    return (dy.t() @ x).masked_fill_(~unpack_mask(bits, x.shape[1]), 0)
