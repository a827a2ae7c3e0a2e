"""A weight under a mask: zeros outside the mask, and what kernels read in the weight's place.

Both are made once and hold until the weight changes. ``mark`` says which writes it sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycse.kernels import native
from pycse.ops import sparse as ops


class Seen(NamedTuple):
    """A weight as it was when something was made of it."""

    weight: Tensor
    mark: Any
    made: Any = None

    def holds(self, weight: Tensor, now: Any) -> bool:
        return self.weight is weight and self.mark == now


def mark(weight: Tensor) -> tuple[Any, ...]:
    """What differs after a write to a weight, but for a write to some single numbers of ``weight.data``."""
    version = 0 if weight.is_inference() else weight._version
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return weight.data_ptr(), version
    address = weight.data_ptr()
    return address, version, native().fingerprint(address, weight.nbytes)


def zeroed(weight: Tensor, mask: Tensor, seen: Seen | None) -> Seen | None:
    """The weight, set to 0 outside the mask unless ``seen`` tells that it is; None for one that is not ours to write.

    Optimizers write there: what was removed after they took steps still has momentum. Merged adapters do as well.
    """
    if type(weight) is not nn.Parameter or weight.is_meta or weight._is_zerotensor():
        return None
    if seen is not None and seen.holds(weight, mark(weight)):
        return seen
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return None
    with torch.no_grad():
        if seen is not None and seen.weight is weight:
            # No forward since then used what lies outside the mask: its backward need not hear of this write.
            weight.data.masked_fill_(~mask, 0)
        elif weight.masked_fill(mask, 0).any():  # a write breaks the backward of an earlier forward
            weight.masked_fill_(~mask, 0)
    return Seen(weight, mark(weight))


def zero_shards(weight: Tensor, mask: Tensor) -> None:
    """``zeroed`` for a weight that is spread over processes (DTensor), without communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh  # type: ignore[attr-defined]
    with torch.no_grad():
        weight.masked_fill_(DTensor.from_local(~mask, mesh, [Replicate()] * mesh.ndim, run_check=False), 0)


class KeptGradient(torch.autograd.Function):
    """The weight itself, with a gradient of exactly 0 outside the mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient.masked_fill(~mask, 0), None


def semi_structured(weight: Tensor, seen: Seen | None) -> Seen:
    """PyTorch's compressed 2:4 weight; made again when the weight changes (not for writes to ``weight.data``)."""
    now = mark(weight)
    if seen is not None and seen.holds(weight, now):
        return seen
    return Seen(weight, now, torch.sparse.to_sparse_semi_structured(weight.detach()))


def packable(weight: Tensor) -> bool:
    """Whether the CPU kernel can read the weight from a copy of its kept numbers."""
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and not weight.is_neg()
        and not weight._is_zerotensor()
    )


def packed(weight: Tensor, index: tuple[Any, ...], seen: Seen | None) -> Seen:
    """The pattern of an operator's index, with the single weights as the CPU kernel reads them."""
    now = mark(weight)
    if seen is not None and seen.holds(weight, now) and seen.made.ptr is index[0]:
        return seen
    return Seen(weight, now, ops.packed(weight, *index))
