"""torch.distributed's collectives as this package calls them: each says what it was for where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

# Their names from PyTorch 2.13 on, which warns of the older ones.
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@contextmanager
def during(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"pycse: the ranks of a loss could not exchange {what} (one may have ended, or called no loss): {error}"
        ) from error


def all_gather(out: Tensor, own: Tensor, group: Any, what: str) -> None:
    """out: what each rank has, in their order, in one dimension."""
    with during(what):
        _GATHER(out, own, group=group)


def reduce_scatter(own: Tensor, every: Tensor, group: Any, what: str) -> None:
    """own: this rank's part of the sum over ranks of ``every``."""
    with during(what):
        _SCATTER(own, every, group=group)


def all_reduce(t: Tensor, group: Any, what: str) -> None:
    """t: the sum over ranks, in place."""
    with during(what):
        dist.all_reduce(t, group=group)


def all_gather_object(own: Any, group: Any, what: str) -> list[Any]:
    told: list[Any] = [None] * dist.get_world_size(group)
    with during(what):
        dist.all_gather_object(told, own, group=group)
    return told
