"""What rows with negatives in parts are made of (parts.py): sides, which are rows or keys and sum their gradients;
directions, each a panel of a side's rows and a side's keys; listed pairs, and positives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pycse.logits import NONE, Coefficients, Logit, Term
from pycse.panels import products
from pycse.panels.contrastive import Guide, Kernels, KeyGradient, LogSums, State
from pycse.problem import FIXED_RANGE, Contrastive

LOWEST = -3e8  # a logit below any that float32 resolves (kernels/common/loss.h)
PAIR_BYTES = 8 << 20  # of the listed keys' embeddings that are gathered at a time


@dataclass
class Part(Contrastive):
    """A problem whose rows sum over their negatives alone: its positive's logit is a constant below all others."""

    whole: Contrastive | None = None
    hard: bool = True  # whether hardness weighs its negatives
    own: tuple[float, float] = (0.0, 0.0)  # of the rows' own hard negatives

    @property
    def logit(self) -> Logit:
        assert self.whole is not None
        logit, low = self.whole.logit, LOWEST
        if self.shift is not None:  # float32 has exp(-FIXED_RANGE) still
            assert not isinstance(self.temperature, Tensor) and not isinstance(self.m, Tensor)
            low = logit.range(self.temperature, self.m)[0] - FIXED_RANGE / 2
        q, b = logit.negative
        b = b if self.hard else b._replace(fixed=0.0)
        return replace(logit, positive=(NONE, NONE, Term(fixed=low)), negative=(q, b), own=self.own)

    @property
    def shift(self) -> float | None:
        assert self.whole is not None
        return self.whole.shift


class Side:
    """Embeddings that are rows or keys of parts, and the sum of their gradients, in units of the keys' r. ``first`` is
    the first one's number as a row."""

    def __init__(self, p: Contrastive, z: Tensor, k: Kernels, need: bool, first: int = 0) -> None:
        self.p, self.z, self.k, self.first = p, z, k, first
        self.keys, self.norms = z, torch.ones(z.shape[0], dtype=p.acc, device=z.device)
        self.r, self.far = self.norms, None  # of keys
        if p.normalize:
            self.far = k.normalize(z, self.norms, None)
            if self.far:  # a key's product may overflow: all of them from a normalised copy
                self.keys, self.r = k.empty(*z.shape, dtype=z.dtype), torch.ones_like(self.norms)
                k.normalize(z, None, self.keys)
        self.total = KeyGradient(z, k, single=False) if need else None
        if self.total is not None:
            self.total.begin()

    def allocate(self, c: int) -> None:
        if self.p.normalize:
            self.memory = self.k.empty(c, self.z.shape[1], dtype=self.z.dtype)

    def panel(self, i0: int, n: int) -> None:
        """rows: the unit rows from i0 on."""
        self.rows = self.z[i0 - self.first : i0 - self.first + n]
        if self.p.normalize:
            rows, self.rows = self.rows, self.memory[:n]
            self.k.normalize(rows, None, self.rows)

    def unit_keys(self, j: Tensor) -> Tensor:
        return self.keys[j].to(self.p.acc) * self.r[j, None]

    def add_rows(self, i0: int, g: Tensor, factors: Tensor | None = None) -> None:
        """The gradient g of unit rows from i0 on, times factors."""
        if self.total is not None:
            at = i0 - self.first
            r = self.r[at : at + g.shape[0]]
            self.total.add_scaled(at, g, r if factors is None else r * factors)

    def add_keys(self, j: Tensor, g: Tensor) -> None:
        """The gradient g of unit keys j, the same sum each time: on a GPU a sorted one, as atomic sums come in any
        order."""
        if self.total is None:
            return
        g = (g * self.r[j, None]).to(self.total.total.dtype)
        if g.is_cuda:
            self.total.total.index_put_((j,), g, accumulate=True)
        else:
            self.total.total.index_add_(0, j, g)

    def gradient(self) -> Tensor | None:
        if self.total is None:
            return None
        total, z = self.total.total, self.z
        fits = total.dtype == z.dtype and total.is_contiguous()
        dz = total if fits else self.k.empty(*z.shape, dtype=z.dtype)
        if self.p.normalize:
            self.k.project(z, total, self.norms, dz, scaled=not self.far)
        elif not fits:
            dz.copy_(total)
        return dz


class Direction:
    """One part: its kernels, panel and sides. All rows share its keys, ``shared`` says which of y's they are."""

    def __init__(self, part: Part, kernels: type[Kernels], x: Side, y: Side, shared: Tensor | slice) -> None:
        B, N, acc, device = part.B, part.z2.shape[0], part.acc, part.z1.device
        new = lambda *n: torch.empty(n, dtype=acc, device=device)  # noqa: E731
        self.p, self.x, self.y, self.shared = part, x, y, shared
        self.state = State(r2=y.r[shared], coef=1.0, loss=new(B))
        self.state.sums = LogSums.empty(B, kernels.statistics or acc, part)
        self.state.dlogit = new(part.gradients, B) if part.trained else None
        self.k = kernels(part, self.state)
        # Keys that do not lie together in y have a gradient of their own until the end.
        self.keys = y.total
        if y.total is not None and y.z.shape[0] > N:
            self.keys = KeyGradient(part.z2, self.k, single=False)
            self.keys.begin()

    def allocate(self, c: int) -> None:
        N = self.p.z2.shape[0]
        stride = products.row_stride(N, self.p.z1.device, self.p.z1.element_size())
        self.panel = self.k.empty(c, stride, dtype=self.p.z1.dtype)[:, :N]
        self.guide = Guide(self.p, self.k, c) if self.p.guided else None

    def similarities(self, i0: int, n: int) -> None:
        self.S = self.panel[:n]
        if self.guide is not None:
            self.state.T = self.guide.panel(i0, n)
        self.k.similarities(self.x.rows, self.p.z2, self.S)

    def positives(self, i0: int) -> Tensor:
        """The similarities of the rows' positives as the panel has them: a key that is equal to it is not above."""
        n = len(self.S)
        if self.p.positives is None:
            j = torch.arange(i0, i0 + n, dtype=torch.int64, device=self.S.device)
        else:
            j = self.p.positives[i0 : i0 + n].clamp(0, self.S.shape[1] - 1)
        return self.S.gather(1, j[:, None]).squeeze(1).to(self.p.acc) * self.state.r2[j]

    def sums(self, i0: int, grad: bool) -> Tensor:
        """lneg of rows I; with ``grad`` G over the panel."""
        n = len(self.S)
        self.f = self.k.rows(self.S, i0, grad)
        assert self.state.sums is not None
        return self.state.sums.lneg[i0 : i0 + n]

    @property
    def negatives_dlogit(self) -> Tensor:
        assert self.state.dlogit is not None
        return self.state.dlogit[3:]

    def add_gradients(self, i0: int, w: Tensor, g1: Tensor) -> None:
        """The panel's share: w = dL/dlneg of rows I. g1 is memory for a product."""
        I = slice(i0, i0 + self.S.shape[0])
        if self.state.dlogit is not None:
            self.state.dlogit[:, I].mul_(w)
        scale = (w if self.f is None else w * self.f).to(self.p.acc)
        if self.x.total is not None:
            self.x.add_rows(i0, self.k.product(self.S, self.p.z2, g1[: self.S.shape[0]]), scale)
        if self.keys is not None:
            rows = self.x.rows
            self.keys.add(self.S, torch.mul(rows, scale[:, None], out=torch.empty_like(rows)))

    def finish(self) -> None:
        """Keys that did not lie together to their places."""
        if self.keys is not None and self.keys is not self.y.total:
            assert self.y.total is not None
            self.y.total.total[self.shared] += self.keys.total


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Row by row. Listed pairs and positives come this way: equal embeddings have equal similarities."""
    return torch.bmm(x[:, None], y[:, :, None]).view(-1)


class Lists:
    """The rows' own negatives, pair by pair."""

    def __init__(self, p: Contrastive, x: Side, y: Side, c: Coefficients, wide: torch.dtype) -> None:
        assert p.negatives_ptr is not None and p.negatives_index is not None
        device = p.z1.device
        self.p, self.x, self.y, self.c, self.wide = p, x, y, c, wide
        self.ptr = p.negatives_ptr.tolist()
        self.index = p.negatives_index.to(device)
        self.lengths = p.negatives_ptr.diff().to(device)
        self.row = torch.repeat_interleave(self.lengths, output_size=self.index.shape[0])
        self.dlogit = torch.zeros(2, dtype=p.acc, device=device)  # of the negatives' q and b

    def _chunks(self, i0: int, a: int, b: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of the panel's pairs [a, b): which of them, their rows from i0 on, their keys."""
        step = max(1, PAIR_BYTES // (self.p.z1.shape[1] * self.p.acc.itemsize))
        for k in range(a, b, step):
            part = slice(k, min(b, k + step))
            yield slice(part.start - a, part.stop - a), self.row[part] - i0, self.index[part]

    def _dots(self, rows: Tensor, keys: Tensor, i0: int, a: int, b: int) -> Tensor:
        out = torch.empty(b - a, dtype=self.p.acc, device=rows.device)
        for at, i, j in self._chunks(i0, a, b):
            out[at] = dots(rows[i].to(self.p.acc), keys[j].to(self.p.acc))
        return out

    def sums(self, i0: int, n: int, bound: Tensor | None, guide_bound: Tensor | None) -> Tensor:
        p, c = self.p, self.c
        a, b = self.ptr[i0], self.ptr[i0 + n]
        row, index = self.row[a:b], self.index[a:b]
        self.s = self._dots(self.x.rows, self.y.keys, i0, a, b).mul_(self.y.r[index])
        l = (
            self.s * (c.b + c.own_b) + c.own_c
            if p.logit.linear
            else (c.q * self.s + (c.b + c.own_b)) * self.s + c.own_c
        )
        if p.query_ids is not None and p.key_ids is not None:
            l.masked_fill_(p.query_ids[row] == p.key_ids[index], -torch.inf)
        if bound is not None:
            l.masked_fill_(self.s > bound[row - i0], -torch.inf)
        if guide_bound is not None:
            if p.guide_logits is not None:
                t = p.rows_of(p.guide_logits, i0, n)[row - i0, index].to(p.acc)
            else:
                assert p.guide_queries is not None and p.guide_keys is not None
                t = self._dots(p.rows_of(p.guide_queries, i0, n), p.guide_keys, i0, a, b)
            l.masked_fill_(t > guide_bound[row - i0], -torch.inf)
        lengths = self.lengths[i0 : i0 + n]
        top = torch.segment_reduce(l, "max", lengths=lengths, initial=LOWEST)
        self.e = l.sub_(top[row - i0]).exp_()
        self.z = torch.segment_reduce(self.e, "sum", lengths=lengths, initial=0.0).to(self.wide)
        return self.z.log() + top.to(self.wide)

    def add_gradients(self, i0: int, n: int, w: Tensor) -> None:
        a, b = self.ptr[i0], self.ptr[i0 + n]
        row = self.row[a:b] - i0
        P = self.e * (w / torch.where(self.z > 0, self.z, 1)).to(self.p.acc)[row]
        if self.p.trained:
            self.dlogit += torch.stack(((P * self.s * self.s).sum(), (P * self.s).sum()))
        g = (P * (self.c.slope if self.p.logit.linear else 2 * self.c.q * self.s + self.c.slope))[:, None]
        for at, i, j in self._chunks(i0, a, b):
            self.x.add_keys(i + (i0 - self.x.first), g[at] * self.y.unit_keys(j))
            self.y.add_keys(j, g[at] * self.x.rows[i])


class Positives:
    """The rows' positives, pair by pair."""

    def __init__(self, p: Contrastive, x: Side, y: Side, c: Coefficients) -> None:
        B, device = p.B, p.z1.device
        self.p, self.x, self.y, self.c = p, x, y, c
        self.dlogit = torch.empty(3, B, dtype=p.acc, device=device)

    def similarities(self, i0: int, n: int) -> Tensor:
        """Of rows I; on a GPU, where nobody has looked, one that is no key gives NaN."""
        p, N = self.p, self.p.z2.shape[0]
        if p.positives is None:
            j = torch.arange(i0, i0 + n, dtype=torch.int64, device=p.z1.device)
        else:
            j = p.positives[i0 : i0 + n]
        self.i0, self.j = i0, j.clamp(0, N - 1)
        self.q, self.d = self.x.rows.to(p.acc), self.y.unit_keys(self.j)
        s = dots(self.q, self.y.keys[self.j].to(p.acc)) * self.y.r[self.j]
        self.s = torch.where(self.j == j, s, torch.nan)
        return self.s

    def logits(self) -> Tensor:
        s, c = self.s, self.c
        return (s * c.positive_b if self.p.logit.linear else (c.positive_q * s + c.positive_b) * s) + c.positive_c

    def add_gradients(self, P: Tensor) -> None:
        """P = dL/dl_pos."""
        s, c = self.s, self.c
        self.dlogit[:, self.i0 : self.i0 + len(s)] = torch.stack((P * s * s, P * s, P))
        g = (P * (c.positive_b if self.p.logit.linear else 2 * c.positive_q * s + c.positive_b))[:, None]
        self.x.add_rows(self.i0, g * self.d)
        self.y.add_keys(self.j, g * self.q)

    def guide_bound(self) -> Tensor | None:
        """Above which a key is no negative by the guide."""
        p, at = self.p, (self.i0, len(self.j))
        if not p.guided:
            return None
        if p.guide_logits is not None:
            t = p.rows_of(p.guide_logits, *at).gather(1, self.j[:, None]).squeeze(1).to(p.acc)
        else:
            assert p.guide_queries is not None and p.guide_keys is not None
            t = dots(p.rows_of(p.guide_queries, *at).to(p.acc), p.guide_keys[self.j].to(p.acc))
        return p.guide_threshold(t)
