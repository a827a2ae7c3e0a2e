"""Row panels where a row's negatives come in parts: keys by direction (documents, queries), and lists of its own.

Each part is what pycse/panels/contrastive.py has for a whole loss, a panel and the row kernels of a backend, which here
sum over the negatives alone; a row's parts are joined by their log-sums. With unit rows x, y of a part k:

    lneg_k  = log sum_neg exp(l)                           the kernel's; G_k f_k = dl/ds exp(l - lneg_k) over its panel
    l_pos   of the positive's cosine, from the embeddings: once, however often it counts
    Lambda  = log sum_k exp(lneg_k)
    joint:          total = log(exp(Lambda) + n exp(l_pos)), L = total - l_pos      n: 2 where dq counts it again
    per direction:  L = mean_k log(1 + exp(lneg_k - l_pos))
    log-sums alone: L = total or Lambda

The gradient of part k is G_k f_k w_k with w_k = dL/dlneg_k; the positive's is P = dL/dl_pos, so that a confident row
keeps its digits: P = -sum_neg. A pair of a list is a dot product, its sums PyTorch's: B N D operations are of the keys
that rows share, D of each listed one.

2 B N_k D operations a product, three products a part; O(c sum_k N_k) memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pycse.logits import Coefficients
from pycse.panels.contrastive import Kernels, State, panel_rows
from pycse.panels.sides import Direction, Lists, Part, Positives, Side, dots
from pycse.problem import Contrastive, Needs, Result


class Own:
    """A problem's rows against its own keys, panel by panel."""

    def __init__(self, p: Contrastive, kernels: type[Kernels]) -> None:
        self.p, self.kernels, self.wide = p, kernels, kernels.statistics or p.acc
        self.grad = p.needs.z1 or p.needs.z2 or p.trained
        new = lambda *n: torch.empty(n, dtype=p.acc, device=p.z1.device)  # noqa: E731
        state = State(r2=new(p.z2.shape[0]), coef=1.0, loss=new(p.B))
        self.norms = kernels(_part(p, p.z1, p.z2, positives=p.positives, key_ids=p.key_ids), state)
        self.x = Side(p, p.z1, self.norms, p.needs.z1, p.first)
        self.y = Side(p, p.z2, self.norms, p.needs.z2)
        c = Coefficients(*p.coefficients())
        self.bounds = new(p.B) if p.excludes else None
        self.parts = _directions(p, self.x, self.y, self.bounds, kernels)
        self.positives = Positives(p, self.x, self.y, c)
        self.lists = Lists(p, self.x, self.y, c, self.wide) if p.negatives_index is not None else None
        count = p.mine.stop - p.mine.start
        self.c = panel_rows(count, sum(one.p.z2.shape[0] for one in self.parts), p, self.norms.temporaries)
        self.sides = (self.x, self.y) if any(one.x is self.y for one in self.parts) else (self.x,)
        for each in (*self.parts, *self.sides):
            each.allocate(self.c)
        self.g1 = self.norms.empty(self.c if self.grad else 0, p.z1.shape[1], dtype=p.z1.dtype)

    def guide_positives(self) -> Tensor:
        """(B,) similarities of rows and positives by the guide."""
        p = self.p
        assert p.guide_queries is not None and p.guide_keys is not None
        positives = p.guide_keys[: p.B] if p.positives is None else p.guide_keys[p.positives]
        return dots(p.guide_queries.to(p.acc), positives.to(p.acc))

    def panels(self) -> Iterator[tuple[int, int]]:
        """First rows and numbers of rows, with the unit rows in place."""
        for i0 in range(self.p.mine.start, self.p.mine.stop, self.c):
            n = min(self.c, self.p.mine.stop - i0)
            for side in self.sides:
                side.panel(i0, n)
            yield i0, n

    def sums(self, i0: int, n: int, grad: bool) -> tuple[list[Tensor], Tensor]:
        """Log-sums of the parts of rows I, lists last, and their positives' logits; with ``grad`` G over the panels."""
        p, I = self.p, slice(i0, i0 + n)
        s_pos = self.positives.similarities(i0, n)
        for one in self.parts:
            one.similarities(i0, n)
        if self.bounds is not None:  # a panel of 16 bits has rounded its similarities: from the embeddings
            self.bounds[I] = p.threshold(s_pos if p.z1.dtype == torch.bfloat16 else self.parts[0].positives(i0), I)
        lneg = [one.sums(i0, grad) for one in self.parts]
        if self.lists is not None:
            bound = p.threshold(s_pos, I) if p.excludes else None
            lneg.append(self.lists.sums(i0, n, bound, self.positives.guide_bound()))
        return lneg, self.positives.logits().to(self.wide)

    def add_gradients(self, i0: int, n: int, w: list[Tensor], P: Tensor) -> None:
        """w = dL/dlneg of each part of rows I, P = dL/dl_pos."""
        for one, w_k in zip(self.parts, w):
            one.add_gradients(i0, w_k, self.g1)
        if self.lists is not None:
            self.lists.add_gradients(i0, n, w[-1])
        self.positives.add_gradients(P.to(self.p.acc))

    def result(self, loss: Tensor, others: list[Tensor]) -> Result:
        """From the rows' losses; others: gradients of the negatives' coefficients beside its own, (2, B) each."""
        p = self.p
        for one in self.parts:
            one.finish()
        dlogit: Tensor | None = None
        if p.trained:
            dlogit = torch.zeros(p.gradients, p.B, dtype=p.acc, device=p.z1.device)
            dlogit[:3] = self.positives.dlogit
            for more in (*(one.negatives_dlogit for one in self.parts), *others):
                dlogit[3:] += more
            if self.lists is not None:
                dlogit[3:, p.mine.start] += self.lists.dlogit
            dlogit = dlogit[:, p.mine]
        return p.result(loss, self.x.gradient(), self.y.gradient(), dlogit)


class Block:
    """A problem's rows against keys of other rows, none of which is a positive. A key of zeros, the last, stands in its
    place; ``queries`` and ``documents`` have it."""

    def __init__(
        self, own: Own, documents: Tensor, queries: Tensor | None, document_ids: Tensor | None,
        query_ids: Tensor | None, guide_keys: Tensor | None,
    ) -> None:  # fmt: skip
        p, self.own = own.p, own
        need = p.needs.z2
        guide_queries = p.guide_queries
        if guide_queries is not None and guide_keys is not None:
            # One more feature gives the key of zeros, by the guide, the similarity of each row's positive.
            t_pos, others = own.guide_positives(), guide_keys.new_zeros(guide_keys.shape[0], 1)
            others[-1] = 1
            guide_queries = torch.cat((guide_queries, t_pos[:, None].to(guide_queries.dtype)), 1)
            guide_keys = torch.cat((guide_keys, others), 1)
        self.documents = Side(p, documents, own.norms, need)
        self.queries = None if queries is None else Side(p, queries, own.norms, p.needs.z1)
        keys = {"d": (self.documents, document_ids), "q": (self.queries, query_ids)}
        rows = {"d": own.y, "q": own.x}
        self.parts = []
        for name in directions(p):
            side, ids = keys[name[1]]
            assert side is not None
            nobody = torch.full((p.B,), side.z.shape[0] - 1, dtype=torch.int64, device=p.z1.device)
            part = _part(
                p, p.z1, side.keys, bounds=own.bounds, positives=nobody, hard=p.symmetric or name == "qd", key_ids=ids,
                query_ids=p.key_ids if p.symmetric and name == "dq" else p.query_ids,
                guide_queries=guide_queries, guide_keys=guide_keys,
            )  # fmt: skip
            self.parts.append(Direction(part, own.kernels, rows[name[0]], side, slice(None)))
        for one in self.parts:
            one.allocate(own.c)

    def sums(self, i0: int, n: int, grad: bool) -> list[Tensor]:
        for one in self.parts:
            one.similarities(i0, n)
        return [one.sums(i0, grad) for one in self.parts]

    def add_gradients(self, i0: int, w: list[Tensor]) -> None:
        for one, w_k in zip(self.parts, w):
            one.add_gradients(i0, w_k, self.own.g1)


def contrastive(p: Contrastive, kernels: type[Kernels]) -> Result:
    own = Own(p, kernels)
    coef, mine = p.placed(p.row_coefficients()), p.mine
    loss = torch.empty(p.B, dtype=p.acc, device=p.z1.device)
    for i0, n in own.panels():
        I = slice(i0, i0 + n)
        lneg, l_pos = own.sums(i0, n, own.grad)
        weight = (coef[I] if isinstance(coef, Tensor) else torch.full_like(loss[I], coef)).to(own.wide)
        loss[I], P, w = joined(p, lneg, l_pos, weight)
        if own.grad:
            own.add_gradients(i0, n, w, P)
    return own.result(loss[mine], [])


def _directions(p: Contrastive, x: Side, y: Side, bounds: Tensor | None, kernels: type[Kernels]) -> list[Direction]:
    shared: Tensor | slice = slice(None)
    positives, own = p.positives, p.logit.own
    if p.negatives_index is not None:
        (shared, positives), own = _shared(p), (0.0, 0.0)
    main = _part(
        p, p.z1, y.keys[shared], bounds=bounds, positives=positives, own=own,
        key_ids=None if p.key_ids is None else p.key_ids[shared],
        guide_queries=p.guide_queries, guide_keys=None if p.guide_keys is None else p.guide_keys[shared],
        guide_logits=None if p.guide_logits is None else p.guide_logits[:, shared],
    )  # fmt: skip
    result = [Direction(main, kernels, x, y, shared)]
    sides, ids = {"q": x, "d": y}, {"q": p.query_ids, "d": p.key_ids}
    for name in directions(p)[1:]:
        rows, keys = (sides[side] for side in name)
        own = (0.0, -math.inf) if name == "dd" and p.z2.shape[0] > p.B else (0.0, 0.0)
        # A column of a symmetric loss is a row of documents in all respects; other directions' rows are the queries'.
        part = _part(
            p, p.z1, keys.keys, bounds=bounds, hard=p.symmetric, own=own,
            query_ids=p.key_ids if p.symmetric else p.query_ids, key_ids=ids[name[1]],
        )  # fmt: skip
        result.append(Direction(part, kernels, rows, keys, slice(None)))
    return result


def directions(p: Contrastive) -> list[str]:
    return ["qd", "dq"] if p.symmetric else p.directions.split()


def joined(p: Contrastive, lneg: list[Tensor], l_pos: Tensor, coef: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """From the parts' log-sums the rows' values L, and coef dL/dl_pos and coef dL/dlneg of each part."""
    names = directions(p)
    if p.symmetric or (p.partition == "per_direction" and len(names) > 1):
        d = torch.stack(lneg) - l_pos
        w = coef / len(names) * d.sigmoid()
        return torch.logaddexp(torch.zeros_like(d), d).mean(0), -w.sum(0), list(w)
    total_neg = lneg[0] if len(lneg) == 1 else torch.stack(lneg).logsumexp(0)
    if p.output == "negatives":
        total, P = total_neg, torch.zeros_like(l_pos)
        values = total
    else:
        times = 2 if "dq" in names else 1
        d = total_neg - l_pos - math.log(times)
        total = torch.logaddexp(total_neg, l_pos + math.log(times))
        if p.output == "logsum":
            values, P = total, coef * (-d).sigmoid()
        else:
            values, P = torch.logaddexp(torch.zeros_like(d), d) + math.log(times), -coef * d.sigmoid()
    return values, P, [coef * (part - total).exp().masked_fill(torch.isneginf(part), 0) for part in lneg]


def _part(p: Contrastive, z1: Tensor, z2: Tensor, bounds: Tensor | None = None, **more: Any) -> Part:
    """A problem of unit rows; what is not given is as if nobody had asked for it."""
    needs = Needs(p.needs.z1, p.needs.z2, p.trained)
    return Part(
        z1, z2, p.temperature, p.m, **{
            "query_ids": p.query_ids, "exclude_each": bounds, "exclude_by": "constant", "form": p.form,
            "guide_above": p.guide_above, "guide_by": p.guide_by, "normalize": False, "reduction": "sum",
            "share": p.share, "needs": needs, "whole": p, **more,
        },
    )  # fmt: skip


def _shared(p: Contrastive) -> tuple[Tensor | slice, Tensor | None]:
    """Which keys all rows share, and where the rows' positives stand among them."""
    assert p.negatives_index is not None
    B, N = p.B, p.z2.shape[0]
    index = p.negatives_index
    listed = torch.zeros(N, dtype=torch.bool, device=index.device)
    listed[index] = True
    shared = (~listed).nonzero().squeeze(1)
    count = shared.shape[0]
    if count == 0 or shared[-1] == count - 1:
        return slice(0, count), p.positives
    place = torch.empty(N, dtype=torch.int64, device=index.device)
    place[shared] = torch.arange(count, dtype=torch.int64, device=index.device)
    place = place.to(p.z1.device)
    return shared.to(p.z1.device), place[:B] if p.positives is None else place[p.positives.clamp(0, N - 1)]
