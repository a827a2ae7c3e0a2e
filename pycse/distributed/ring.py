"""Keys that travel from rank to rank instead of being gathered: memory of one rank's keys, whatever their number.

    forward    for t = 0 .. W - 1:  log-sums of the rows against the keys of rank r - t, which come while those before
               are computed                                                                        2 B N D operations
    backward   once more, now with all log-sums known: G, its two products; the keys' gradients travel with them, one
               rank behind, until they are home                                                    6 B N D

B rows of the rank, N keys of all. Each rank sends W - 1 blocks in each round, and W blocks of gradients.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycse import backends
from pycse.distributed.collectives import during
from pycse.distributed.payload import ALIGNED, Layout
from pycse.ops import fused
from pycse.panels.parts import Block, Own, directions, joined
from pycse.problem import Contrastive, Needs

# Keys of all ranks and their gradients: up to this exchange="auto" gathers them.
GATHERED_BYTES = 4 << 30


def gathered_bytes(layout: Layout, D: int, dtype: torch.dtype, gradients: bool) -> int:
    """What a rank holds of all keys when they are gathered."""
    wide = 8 if dtype == torch.float64 else 4
    return layout.N * D * (dtype.itemsize + wide * gradients)


@dataclass
class Travelling:
    """What goes round of each rank: pieces of rows or keys, with a row of zeros behind each, in one buffer of bytes."""

    group: Any
    layout: Layout
    pieces: dict[str, tuple[Tensor, str]]  # this rank's: by name, and whether it has rows or keys

    def __post_init__(self) -> None:
        self.begins = []
        for rank in range(self.layout.size):
            sizes = (self.count(name, rank) * _row_bytes(t) for name, (t, _) in self.pieces.items())
            self.begins.append([0, *itertools.accumulate(-(-size // ALIGNED) * ALIGNED for size in sizes)])
        self.most = max(begin[-1] for begin in self.begins)
        first = next(iter(self.pieces.values()))[0]
        self.own = torch.zeros(self.most, dtype=torch.uint8, device=first.device)
        for name, at in self.views(self.own, self.layout.rank).items():
            at[:-1] = self.pieces[name][0]

    def count(self, name: str, rank: int) -> int:
        """Rows of a rank's piece, that of zeros among them."""
        return (self.layout.rows if self.pieces[name][1] == "rows" else self.layout.keys)[rank] + 1

    def views(self, buffer: Tensor, rank: int) -> dict[str, Tensor]:
        """The pieces of a rank in a buffer that holds its bytes."""
        result = {}
        for (name, (t, _)), at in zip(self.pieces.items(), self.begins[rank]):
            n = self.count(name, rank)
            result[name] = buffer[at : at + n * _row_bytes(t)].view(t.dtype).view(n, *t.shape[1:])
        return result

    def begin(self) -> None:
        """Begins to send this rank's."""
        self.buffers = torch.empty_like(self.own), torch.empty_like(self.own)
        self.pending = _passed(self.group, self.own, self.buffers[0], "keys")

    def round(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The other ranks' pieces, each rank's in turn; the next ones come while these are used."""
        size, rank = self.layout.size, self.layout.rank
        for t in range(1, size):
            _wait(self.pending, "keys")
            held = self.buffers[(t - 1) % 2]
            if t + 1 < size:
                self.pending = _passed(self.group, held, self.buffers[t % 2], "keys")
            yield (rank - t) % size, self.views(held, (rank - t) % size)
        del self.buffers, self.pending


def _row_bytes(t: Tensor) -> int:
    return t.dtype.itemsize * t[:0].new_empty(1, *t.shape[1:]).numel()


def _passed(group: Any, held: Tensor, coming: Tensor, what: str) -> list[Any]:
    """Begins to send to the next rank and to receive from the one before."""
    rank, ranks = dist.get_rank(group), dist.get_process_group_ranks(group)
    sent = dist.P2POp(dist.isend, held, ranks[(rank + 1) % len(ranks)], group)
    with during(what):
        return dist.batch_isend_irecv([sent, dist.P2POp(dist.irecv, coming, ranks[rank - 1], group)])


def _wait(pending: list[Any], what: str) -> None:
    with during(what):
        for work in pending:
            work.wait()


class Home:
    """The sums of keys' gradients on their way: each rank adds its share to what the one before has sent."""

    def __init__(self, travelling: Travelling, names: list[str], like: Tensor) -> None:
        self.travelling, self.names, self.D = travelling, names, travelling.pieces["documents"][0].shape[1]
        most = max(sum(self._counts(rank)) for rank in range(travelling.layout.size)) * self.D
        self.sent, self.received, self.mine = (like.new_zeros(most) for _ in range(3))
        self.pending: list[Any] = []

    def _counts(self, rank: int) -> list[int]:
        return [self.travelling.count(name, rank) for name in self.names]

    def _views(self, buffer: Tensor, rank: int) -> list[Tensor]:
        counts = self._counts(rank)
        return list(buffer[: sum(counts) * self.D].view(-1, self.D).split(counts))

    def add(self, rank: int, gradients: list[Tensor]) -> None:
        """This rank's share of the gradients of a rank's keys, in the order of the round."""
        for view, g in zip(self._views(self.mine, rank), gradients):
            view.copy_(g)
        if self.pending:
            _wait(self.pending, "gradients")
            self.mine += self.received
        self.sent, self.mine = self.mine, self.sent
        self.pending = _passed(self.travelling.group, self.sent, self.received, "gradients")

    def arrived(self) -> list[Tensor]:
        """The sum over all other ranks of the gradients of this rank's keys."""
        _wait(self.pending, "gradients")
        return self._views(self.received, self.travelling.layout.rank)


class Ring(torch.autograd.Function):
    """The rows' losses of a problem whose other keys travel. Differentiable in z1, z2, temperature and m."""

    @staticmethod
    def forward(ctx: Any, p: Contrastive, kernels: Any, travelling: Travelling, *own: Tensor | None) -> Tensor:
        """own: the rank's z1, z2, temperature and m; fewer rows and keys than p where a row stands for none."""
        ctx.set_materialize_grads(False)
        ctx.counts = [t.shape[0] for t in own[:2] if t is not None]
        ctx.p, ctx.kernels, ctx.travelling = p, kernels, travelling
        ctx.needs = Needs(*ctx.needs_input_grad[3:])
        # Embeddings are cast already.
        with _on_device(p), torch.autocast(p.z1.device.type, enabled=False):
            loss, ctx.lneg, ctx.l_pos = sums(p, kernels, travelling)
        # So that a change in place is seen; what does not require grad may be of inference mode.
        ctx.save_for_backward(*(t for t in own if isinstance(t, Tensor) and t.requires_grad))
        return loss[: ctx.counts[0]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        p, _ = ctx.p, ctx.saved_tensors
        coef = torch.zeros_like(ctx.l_pos)
        if upstream is not None:
            coef[: len(upstream)] = upstream
        with _on_device(p), torch.autocast(p.z1.device.type, enabled=False):
            out = gradients(replace(p, needs=ctx.needs), ctx.kernels, ctx.travelling, ctx.lneg, ctx.l_pos, coef)
        dz1, dz2 = (None if g is None else g[:n] for g, n in zip((out.dz1, out.dz2), ctx.counts))
        return None, None, None, dz1, dz2, out.dtemperature, out.dm


def _on_device(p: Contrastive) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(p.z1.device) if p.z1.is_cuda else contextlib.nullcontext()


def _names(p: Contrastive) -> list[str]:
    return [*directions(p), *(["lists"] if p.negatives_index is not None else [])]


def sums(p: Contrastive, kernels: Any, travelling: Travelling) -> tuple[Tensor, list[list[Tensor]], Tensor]:
    """The rows' losses; by rank in the order of the round the log-sums of each direction; the positives' logits."""
    travelling.begin()
    own = Own(replace(p, needs=Needs()), kernels)
    new = lambda: torch.empty(p.B, dtype=own.wide, device=p.z1.device)  # noqa: E731
    lneg, l_pos = [[new() for _ in _names(p)]], new()
    for i0, n in own.panels():
        I = slice(i0, i0 + n)
        parts, l_pos[I] = own.sums(i0, n, False)
        for out, value in zip(lneg[0], parts):
            out[I] = value
    for _, pieces in travelling.round():
        block, found = Block(own, **pieces_of(pieces)), [new() for _ in directions(p)]
        for i0, n in own.panels():
            for out, value in zip(found, block.sums(i0, n, False)):
                out[i0 : i0 + n] = value
        lneg.append(found)
    loss, *_ = joined(p, _over_ranks(p, lneg), l_pos, torch.ones_like(l_pos))
    return loss.to(p.acc), lneg, l_pos


def pieces_of(pieces: dict[str, Tensor]) -> dict[str, Any]:
    names = ("documents", "queries", "document_ids", "query_ids", "guide_keys")
    return {name: pieces.get(name) for name in names}


def _over_ranks(p: Contrastive, lneg: list[list[Tensor]]) -> list[Tensor]:
    """Of each direction, and of lists, which a rank has of its own keys alone."""
    count = len(directions(p))
    by_direction = [torch.stack([one[k] for one in lneg]).logsumexp(0) for k in range(count)]
    return [*by_direction, *lneg[0][count:]]


def gradients(
    p: Contrastive, kernels: Any, travelling: Travelling, lneg: list[list[Tensor]], l_pos: Tensor, coef: Tensor
) -> Any:
    """What sum_i coef_i L_i has of gradients, those of this rank's keys from all ranks."""
    total = _over_ranks(p, lneg)
    _, P, weights = joined(p, total, l_pos, coef)
    shares = [
        [w * (part - whole).exp().masked_fill(torch.isneginf(part), 0) for w, part, whole in zip(weights, one, total)]
        for one in lneg
    ]
    travelling.begin()
    own = Own(p, kernels)
    for i0, n in own.panels():
        I = slice(i0, i0 + n)
        own.sums(i0, n, True)
        own.add_gradients(i0, n, [w[I] for w in shares[0]], P[I])

    queries = "queries" in travelling.pieces
    wanted = [name for name, need in (("documents", p.needs.z2), ("queries", queries and p.needs.z1)) if need]
    home = Home(travelling, wanted, p.z1.new_empty(0, dtype=p.acc)) if wanted else None
    numbers = []
    for (rank, pieces), share in zip(travelling.round(), shares[1:]):
        block = Block(own, **pieces_of(pieces))
        for i0, n in own.panels():
            block.sums(i0, n, True)
            block.add_gradients(i0, [w[i0 : i0 + n] for w in share])
        if p.trained:
            numbers += [one.negatives_dlogit for one in block.parts]
        if home is not None:
            home.add(rank, [getattr(block, name).total.total for name in wanted])
    if home is not None:
        sides = {"documents": own.y, "queries": own.x}
        for name, g in zip(wanted, home.arrived()):
            side = sides[name].total
            assert side is not None
            side.total[: len(g) - 1] += g[:-1]
    return own.result(l_pos.to(p.acc), numbers)


def rows(
    group: Any,
    layout: Layout,
    p: Contrastive,
    own: dict[str, Tensor],
    numbers: dict[str, Any],
    backend: str,
    shared: int,
) -> Tensor:
    """The losses (B,) of a rank's rows.

    Args:
        p: its problem as one process has it; with a row of its own where the rank has none.
        own: its z1 and z2, which are differentiated.
        numbers: temperature and m where they are.
        shared: how many of its keys, the first ones, others see.
    """
    kernels = backends.module(backend, p.z1.device.type, "contrastive").Kernels
    B = layout.rows[layout.rank]
    held = replace(
        p, z1=fused.rows(p.z1.detach()), z2=fused.rows(p.z2.detach()), weight=None, reduction="none",
        temperature=fused.number(p.temperature), m=fused.number(p.m),
    )  # fmt: skip
    pieces: dict[str, tuple[Tensor, str]] = {"documents": (held.z2[:shared], "keys")}
    q_keys = any(name[1] == "q" for name in directions(p))
    if q_keys:
        pieces["queries"] = (held.z1[:B], "rows")
    if p.key_ids is not None:
        pieces["document_ids"] = (p.key_ids[:shared], "keys")
        if q_keys and p.query_ids is not None:
            pieces["query_ids"] = (p.query_ids[:B], "rows")
    if p.guide_keys is not None:
        pieces["guide_keys"] = (p.guide_keys[:shared], "keys")
    given = [numbers.get(name) for name in ("temperature", "m")]
    return Ring.apply(held, kernels, Travelling(group, layout, pieces), own["z1"], own["z2"], *given)
