"""Alignment and uniformity of the joined batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycse import ops
from pycse.distributed.collectives import all_gather, all_reduce
from pycse.distributed.groups import check_device, device_of, group_of
from pycse.distributed.payload import Layout, Piece, gathered
from pycse.distributed.talk import TALK, Headers, exchange
from pycse.problem import Alignment, Uniformity
from pycse.validation.checks import autocast


def _meet(
    name: str, make: Callable[[], Any], group: Any, z: Any, backend: str
) -> tuple[Any, dist.ProcessGroup, Headers]:
    """This rank's problem, and all headers. An error of ``make`` is every rank's."""
    group = group_of(group)
    refused: Exception | None = None
    p: Any = None
    told = {"function": name, "backend": repr(backend), "gradients": str(torch.is_grad_enabled())}
    try:
        p = make()
        check_device(group, z.device)
        told |= {k: repr(v) for k, v in vars(p).items() if not isinstance(v, Tensor) and k not in ("needs", "need")}
        told |= {"features": str(z.shape[1]), "dtype": str(z.dtype), "gradient": str(z.requires_grad)}
    except Exception as error:
        refused = error
    return p, group, exchange(group, device_of(group, z), told, refused, rows=0 if refused else z.shape[0])


def _cast(z: Any) -> Any:
    """As autocast has it."""
    if not (isinstance(z, Tensor) and z.dtype != torch.float64 and autocast(z.device.type)):
        return z
    return z.to(torch.get_autocast_dtype(z.device.type))


def _without(z: Any, rows: int) -> bool:
    """Whether z has fewer rows than one process needs, and is else as it should be."""
    return isinstance(z, Tensor) and z.dim() == 2 and z.shape[0] < rows and z.shape[1] > 0


@torch.compiler.disable(reason=TALK)
def alignment(make: Callable[..., Alignment], x: Tensor, y: Tensor, group: Any, backend: str) -> Tensor:
    """W / sum B times the sum over this rank's pairs."""
    empty = _without(x, 1) and isinstance(y, Tensor) and y.shape == x.shape

    def problem() -> Alignment:
        return make(*(z.detach().new_zeros(1, z.shape[1]) for z in (x, y))) if empty else make(x, y)

    p, group, heads = _meet("alignment", problem, group, x, backend)
    if sum(heads.rows) == 0:
        raise ValueError("x must have at least one row on some rank, got none")
    if empty:
        return (x.sum() + y.sum()).to(torch.promote_types(x.dtype, torch.float32))
    return ops.alignment(p, backend) * (heads.size * x.shape[0] / sum(heads.rows))


@torch.compiler.disable(reason=TALK)
def uniformity(make: Callable[..., Uniformity], z: Tensor, group: Any, backend: str) -> Tensor:
    """The joined batch's uniformity, the same on every rank.

    A rank sums its own rows' pairs with all others; their log-sums are joined, and each rank's gradient is complete.
    """
    z = _cast(z)
    short = _without(z, 2)
    p, group, heads = _meet(
        "uniformity", lambda: make(z.detach().new_zeros(2, z.shape[1]) if short else z), group, z, backend
    )
    layout, own = Layout(heads.rank, heads.rows, [0] * heads.size), z.shape[0]
    if layout.B < 2:
        raise ValueError(f"x must have at least two rows on all ranks together, got {layout.B}")
    (rows,) = gathered(group, layout, [Piece(z, "rows")])
    if own:
        before, after = rows[: layout.row_begin[heads.rank]], rows[layout.row_begin[heads.rank + 1] :]
        p.z, p.others = z, torch.cat((before, after))
        del rows, before, after
        local = ops.uniformity(p, backend)
    else:
        local = z.sum().to(torch.promote_types(z.dtype, torch.float32)) - math.inf
    return _Joined.apply(local, group)


class _Joined(torch.autograd.Function):
    """log sum over ranks exp(l). Every rank's loss depends on all rows alike: upstream gradients are summed."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Any) -> Tensor:
        parts = local.detach().new_empty(dist.get_world_size(group), dtype=torch.float64)
        all_gather(parts, local.detach().double().view(1), group, "sums")
        total = parts.logsumexp(0)
        ctx.group, ctx.share = group, (local.detach().double() - total).exp()
        ctx.save_for_backward(local)  # as calls._Nothing
        return total.to(local.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        total = upstream.double().clone()
        all_reduce(total, ctx.group, "upstream gradients")
        return (total * ctx.share).to(upstream.dtype), None
