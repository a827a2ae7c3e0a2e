"""Which processes share a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pycse import transforms
from pycse.validation.checks import what


def group_of(given: Any) -> dist.ProcessGroup:
    """The process group that ``group=`` names, with this process in it.

    Raises:
        TypeError: it is no group. RuntimeError: it cannot be used, or not here.
    """
    if not (isinstance(given, dist.ProcessGroup) or given == "world" or given == dist.GroupMember.NON_GROUP_MEMBER):
        raise TypeError(f"group must be None, 'world' or a torch.distributed.ProcessGroup, got {what(given)}")
    if transforms.active():
        raise RuntimeError("group cannot be given inside torch.func's transforms, whose calls ranks do not share")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"group={given!r} needs torch.distributed: call torch.distributed.init_process_group first (torchrun "
            "starts the processes), or pass group=None"
        )
    group: Any = dist.group.WORLD if given == "world" else given
    if given == dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank() not in _ranks(group):
        raise RuntimeError(f"group must hold the process that calls, got one without rank {dist.get_rank()}")
    return group


def check_device(group: dist.ProcessGroup, device: torch.device) -> None:
    """That the group has a backend for tensors there."""
    try:
        group._get_backend(device)
    except RuntimeError as error:
        raise RuntimeError(
            f"group must have a backend for {device.type} tensors (gloo for cpu, nccl for cuda), got one of "
            f"{dist.get_backend(group)}"
        ) from error


def device_of(group: dist.ProcessGroup, t: Any) -> torch.device:
    """Where ranks talk: on t's device, or where that cannot be, on one of the group's."""
    try:
        if isinstance(t, torch.Tensor):
            group._get_backend(t.device)
            return t.device
    except RuntimeError:
        pass
    return torch.device(dist.distributed_c10d._get_object_coll_device(group))


def _ranks(group: Any) -> list[int]:
    try:
        return dist.get_process_group_ranks(group)
    except (KeyError, ValueError) as error:
        raise RuntimeError("group must be alive, got one that destroy_process_group has ended") from error
