"""What ranks share beside losses: rows of something, and numbers that all of them train."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycse.distributed.collectives import all_gather, all_reduce
from pycse.distributed.groups import group_of
from pycse.distributed.payload import Layout, Piece, gathered
from pycse.distributed.talk import TALK, exchange


@torch.compiler.disable(reason=TALK)
def joined_rows(
    name: str, tensors: list[Tensor] | None, device: torch.device, group: Any
) -> tuple[list[Tensor], slice]:
    """All ranks' rows of each tensor, in the order of the ranks, and which of them are this rank's.

    Args:
        name: whose rows, for the error where ranks differ.
        tensors: (B,) or (B, ...) each, B this rank's own; None where it has none of them, as then no rank may have.
        device: of the tensors.
    """
    group = group_of(group)
    told = {"function": name, "columns": "none" if tensors is None else str([(t.dtype, t.shape[1:]) for t in tensors])}
    heads = exchange(group, device, told, None, rows=len(tensors[0]) if tensors else 0)
    layout = Layout(heads.rank, heads.rows, [0] * heads.size)
    own = slice(layout.row_begin[heads.rank], layout.row_begin[heads.rank + 1])
    return gathered(group, layout, [Piece(t, "rows") for t in tensors]) if tensors else [], own


@torch.compiler.disable(reason=TALK)
def averaged(t: Tensor, group: Any = "world") -> Tensor:
    """t, whose gradient becomes the ranks' mean: of a number that all of them train, and that DDP does not know."""
    return _Averaged.apply(t, group_of(group))


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        total = upstream.clone()
        all_reduce(total, ctx.group, "the gradient of a number")
        return total / dist.get_world_size(ctx.group), None


@torch.compiler.disable(reason=TALK)
def differ(t: Tensor, group: Any) -> list[float]:
    """A number of each rank, in their order; equal ones are []."""
    group = group_of(group)
    every = t.detach().new_empty(dist.get_world_size(group), dtype=torch.float64)
    all_gather(every, t.detach().double().view(1), group, "a number")
    values = every.tolist()
    alike = all(value == values[0] or (math.isnan(value) and math.isnan(values[0])) for value in values)
    return [] if alike else values
