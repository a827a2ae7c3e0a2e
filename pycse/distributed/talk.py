"""What the ranks of a group tell each other in one call: headers first, and an error on all of them where they differ.

A header has a fixed size, so that ranks which disagree find out instead of waiting for each other: a digest of what
must be equal on all of them, how many rows and keys each holds, and what all have to know before they compute. Only
where digests differ, or a rank has refused its arguments, are the descriptions themselves exchanged, and every rank
raises.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycse.distributed.collectives import all_gather, all_gather_object
from pycse.distributed.groups import device_of, group_of

TALK = "pycse: ranks talk to each other"  # why torch.compile leaves it out
FIELDS = ("digest", "refused", "rows", "keys", "seed", "total")


@dataclass
class Headers:
    """Of all ranks, in their order."""

    rank: int
    rows: list[int]
    keys: list[int]
    seed: Tensor  # rank 0's, 0-d int64
    total: float  # sum of the weights of all rows

    @property
    def size(self) -> int:
        return len(self.rows)


def exchange(
    group: dist.ProcessGroup,
    device: torch.device,
    description: dict[str, str],
    refused: Exception | None,
    *,
    rows: int = 0,
    keys: int = 0,
    seed: int | Tensor = 0,
    weight: Tensor | None = None,
) -> Headers:
    """The headers of all ranks.

    Args:
        description: what must be equal on all ranks, by argument.
        refused: why this rank cannot take part.
        rows, keys: that this rank shares.
        seed: the one it would draw with.
        weight: of its rows; None counts each row as 1.

    Raises:
        ``refused`` where it is given; on the other ranks RuntimeError, and ValueError on all of them where their
        descriptions differ. Each names ranks and values.
    """
    digest = int.from_bytes(hashlib.blake2b(repr(sorted(description.items())).encode(), digest_size=7).digest(), "big")
    number = seed if not isinstance(seed, Tensor) else 0
    total = struct.unpack("<q", struct.pack("<d", float(rows)))[0]
    own = torch.tensor([digest, refused is not None, rows, keys, number, total], dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        own[FIELDS.index("seed")] = seed
    if weight is not None:
        own[FIELDS.index("total")] = weight.detach().double().sum().view(torch.int64)
    size = dist.get_world_size(group)
    heads = torch.empty(size, len(FIELDS), dtype=torch.int64, device=device)
    all_gather(heads.view(-1), own, group, "headers")
    seeds = heads[0, FIELDS.index("seed")]
    table = dict(zip(FIELDS, heads.t().tolist()))
    if any(table["refused"]) or len(set(table["digest"])) > 1:
        _raise(group, description, refused)
    totals = [struct.unpack("<d", struct.pack("<q", bits))[0] for bits in table["total"]]
    return Headers(dist.get_rank(group), table["rows"], table["keys"], seeds, sum(totals))


@torch.compiler.disable(reason=TALK)
def alike(told: dict[str, str], t: Tensor, given: Any) -> None:
    """That the ranks of a group agree in what a call of several conversations says before the first of them."""
    group = group_of(given)
    exchange(group, device_of(group, t), told, None)


def refuse(error: Exception, t: Any, given: Any) -> None:
    """Raises ``error`` here, and on the other ranks of a group what it says, where they exchange headers next."""
    group = group_of(given)
    exchange(group, device_of(group, t), {}, error)


def _raise(group: dist.ProcessGroup, description: dict[str, str], refused: Exception | None) -> None:
    mine = None if refused is None else f"{type(refused).__name__}: {refused}"
    told = all_gather_object((description, mine), group, "an error")
    if refused is not None:
        raise refused
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(told) if error is not None]
    if errors:
        raise RuntimeError("pycse: a loss over a process group has bad arguments on " + "; ".join(errors))
    names = sorted({name for of, _ in told for name in of})
    differing = [name for name in names if len({of.get(name) for of, _ in told}) > 1]
    # Of two different functions all arguments differ.
    shown = ["function"] if "function" in differing else differing
    raise ValueError("pycse: ranks must call alike; " + "; ".join(_by_rank(name, told) for name in shown))


def _by_rank(name: str, told: list[Any]) -> str:
    ranks: dict[str, list[str]] = {}
    for rank, (of, _) in enumerate(told):
        ranks.setdefault(of.get(name, "not given"), []).append(str(rank))
    values = (f"{value} on rank{'s' * (len(r) > 1)} {', '.join(r)}" for value, r in ranks.items())
    return f"{name} is {' and '.join(values)}"
