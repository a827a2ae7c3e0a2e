"""All ranks' rows and keys in one collective, and their gradients home in another."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycse.distributed.collectives import all_gather, all_reduce, reduce_scatter

ALIGNED = 16  # bytes


@dataclass
class Layout:
    """Where each rank's rows and keys are in the joined batch.

    Keys are grouped as in one process where every rank has K hard negatives a row, keys [k B, (k + 1) B) for each k in
    the order of the rows; else they follow each other rank by rank.
    """

    rank: int
    rows: list[int]
    keys: list[int]

    def __post_init__(self) -> None:
        self.row_begin, self.key_begin = ([0, *itertools.accumulate(counts)] for counts in (self.rows, self.keys))
        held = {(n // b if b and n % b == 0 else 0) for b, n in zip(self.rows, self.keys) if b or n}
        self.groups = held.pop() if len(held) == 1 else 0  # K + 1; 0: not the same on all ranks

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def B(self) -> int:
        return self.row_begin[-1]

    @property
    def N(self) -> int:
        return self.key_begin[-1]

    def place(self, j: Tensor) -> Tensor:
        """The numbers in the joined batch of this rank's keys j."""
        if not self.groups:
            return j + self.key_begin[self.rank]
        B = max(self.rows[self.rank], 1)
        return j.div(B, rounding_mode="floor") * self.B + j % B + self.row_begin[self.rank]

    def joined(self, parts: list[Tensor], of: str) -> Tensor:
        """Each rank's rows or keys in their places."""
        if of == "rows" or self.groups < 2:
            return torch.cat(parts)
        return torch.cat([x.view(self.groups, -1, *x.shape[1:]) for x in parts], 1).flatten(0, 1)

    def parts(self, x: Tensor, of: str) -> list[Tensor]:
        """The opposite: each rank's part of a matrix of the joined batch."""
        if of == "rows":
            return list(x.split(self.rows))
        if self.groups < 2:
            return list(x.split(self.keys))
        return [part.flatten(0, 1) for part in x.view(self.groups, self.B, *x.shape[1:]).split(self.rows, 1)]


@dataclass
class Piece:
    """A tensor whose first dimension is a rank's rows or keys."""

    t: Tensor
    of: str  # "rows" or "keys"

    @property
    def bytes(self) -> int:
        """Of one row."""
        return self.t.dtype.itemsize * self.t[0:0].new_empty(1, *self.t.shape[1:]).numel()


def gathered(group: dist.ProcessGroup, layout: Layout, pieces: list[Piece]) -> list[Tensor]:
    """Each piece of the joined batch, from one collective."""
    counts = {"rows": layout.rows, "keys": layout.keys}
    if len(pieces) == 1 and len(set(counts[pieces[0].of])) == 1:  # as it comes
        piece = pieces[0]
        all_ranks = piece.t.new_empty(sum(counts[piece.of]), *piece.t.shape[1:])
        if all_ranks.numel():
            all_gather(_bytes(all_ranks), _bytes(piece.t), group, "keys")
        return [all_ranks if layout.groups < 2 else layout.joined(list(all_ranks.chunk(layout.size)), piece.of)]
    begins = [
        [0, *itertools.accumulate(-(-counts[p.of][rank] * p.bytes // ALIGNED) * ALIGNED for p in pieces)]
        for rank in range(layout.size)
    ]
    most = max(begin[-1] for begin in begins)
    device = pieces[0].t.device
    own = torch.zeros(most, dtype=torch.uint8, device=device)
    for piece, at in zip(pieces, begins[layout.rank]):
        flat = _bytes(piece.t)
        own[at : at + len(flat)] = flat
    received = torch.empty(layout.size * most, dtype=torch.uint8, device=device)
    if most:
        all_gather(received, own, group, "keys")
    result = []
    for k, piece in enumerate(pieces):
        parts = []
        for rank, begin in enumerate(begins):
            n = counts[piece.of][rank]
            at = rank * most + begin[k]
            part = received[at : at + n * piece.bytes].view(piece.t.dtype)
            parts.append(part.view(n, *piece.t.shape[1:]))
        result.append(layout.joined(parts, piece.of))
    return result


def _bytes(t: Tensor) -> Tensor:
    return t.detach().resolve_neg().contiguous().view(-1).view(torch.uint8)


OWN = 4  # where an Exchange's own tensors begin


class Exchange(torch.autograd.Function):
    """The joined batch's embeddings, whose gradients each rank has of all rows and keys, and each wants of its own.

    Beside them numbers that all ranks have: their gradients become the ranks' mean, or for ``summed`` the sum.
    """

    @staticmethod
    def forward(
        ctx: Any, group: Any, layout: Layout, joined: list[Tensor], of: list[str], *own: Tensor
    ) -> Any:  # fmt: skip
        """joined: the values; own: what this rank has of them; of: "rows", "keys", "mean" or "summed"."""
        ctx.set_materialize_grads(False)
        ctx.group, ctx.layout, ctx.of = group, layout, of
        ctx.like = [(t.shape, t.dtype, t.device) for t in own]
        return tuple(joined)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        layout, of = ctx.layout, ctx.of
        wanted = [k for k, needed in enumerate(ctx.needs_input_grad[OWN:]) if needed]
        result: list[Tensor | None] = [None] * len(upstream)
        matrices = [k for k in wanted if of[k] in ("rows", "keys")]
        if matrices:
            totals = [_total(layout, of[k], upstream[k], ctx.like[k]) for k in matrices]
            homes = reduced(ctx.group, layout, totals, [of[k] for k in matrices])
            for k, home in zip(matrices, homes):
                result[k] = home.to(ctx.like[k][1])
        numbers = [k for k in wanted if of[k] not in ("rows", "keys")]
        if numbers:
            shapes = [ctx.like[k][0] for k in numbers]  # () each, or (K,) of a number for each of K lengths
            zeros = torch.zeros((), dtype=torch.float64, device=ctx.like[numbers[0]][2])
            given = [zeros.expand(s) if (g := upstream[k]) is None else g for k, s in zip(numbers, shapes)]
            packed = torch.cat([g.double().reshape(-1) for g in given])
            all_reduce(packed, ctx.group, "gradients of numbers")
            for k, shape, total in zip(numbers, shapes, packed.split([s.numel() for s in shapes])):
                total = total.view(shape)
                result[k] = (total if of[k] == "summed" else total / layout.size).to(ctx.like[k][1])
        return (*[None] * OWN, *result)


def _total(layout: Layout, of: str, gradient: Tensor | None, like: Any) -> Tensor:
    """A gradient of the joined batch in the type that ranks sum in."""
    shape, dtype, device = like
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    if gradient is None:
        return torch.zeros(layout.B if of == "rows" else layout.N, *shape[1:], dtype=wide, device=device)
    return gradient.to(wide).contiguous()


def reduced(group: dist.ProcessGroup, layout: Layout, totals: list[Tensor], of: list[str]) -> list[Tensor]:
    """Sums over ranks of matrices of the joined batch: of each, this rank's part."""
    counts = {"rows": layout.rows, "keys": layout.keys}
    mine = [counts[name][layout.rank] for name in of]
    D = totals[0].shape[1]
    out = totals[0].new_empty(sum(mine), D)
    even = all(len(set(counts[name])) == 1 for name in of)
    if even and len(totals) == 1 and (of[0] == "rows" or layout.groups < 2):
        if out.numel():
            reduce_scatter(out, totals[0], group, "gradients")
        return [out]
    # Ranks with fewer rows are padded: a collective of equal parts is one, of unequal ones many.
    most = max(map(sum, zip(*(counts[name] for name in of))))
    padded = totals[0].new_zeros(layout.size, most, D)
    for at, parts in zip(padded, zip(*(layout.parts(t, name) for t, name in zip(totals, of)))):
        torch.cat(parts, out=at[: sum(map(len, parts))])
    home = totals[0].new_empty(most, D)
    if most:
        reduce_scatter(home, padded.flatten(0, 1), group, "gradients")
    return list(home[: sum(mine)].split(mine))
