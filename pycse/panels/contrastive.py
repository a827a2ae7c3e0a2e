"""The row-panel algorithm: exact loss and gradients in one pass over blocks of rows, without an N x N matrix.

    for each panel I of c rows:
        S      = z1hat[I] z2^T        GEMM   2 c N D
        rows   S -> losses, G = dL/dS in place, keys' norms folded in
        g1     = G z2                 GEMM   2 c N D     dz1[I] = project(g1)
        g2    += G^T z1hat[I]         GEMM   2 c N D     dz2 = project(g2) at the end

6 N^2 D operations, O(c N) memory, deterministic. Symmetric: a sweep for the log-sums, then one for the gradients, 8 N^2
D, or 6 where one panel holds all similarities. Products are PyTorch's GEMMs unless the backend has faster ones
(panels/products.py); it brings the kernels between them (``Kernels``). G may lack the rows' factors f_i, which are
known only when a row is complete: ``rows`` returns f then, and the small operands take it, z1hat and the projection,
instead of a second visit of the panel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycse.panels import products
from pycse.panels.products import Products
from pycse.problem import Pairs, Result

PANEL_BYTES = 32 << 20  # of S: half of the memory promise in docs/performance.md
INPUT_SHARE = 6  # or a sixth of the inputs, where that is more: products of a few rows are slow


@dataclass
class LogSums:
    """What the symmetric loss keeps between its two sweeps, (B,) each."""

    lpos: Tensor  # logit of the positive
    lneg: Tensor  # log of the sum over the row's negatives
    column_max: Tensor  # in bits: of l / log 2
    column_sum: Tensor
    lneg_column: Tensor  # as lneg, for columns
    lse_column: Tensor  # lneg_column with the positive

    @classmethod
    def empty(cls, B: int, wide: torch.dtype, p: Pairs) -> LogSums:
        new = lambda dtype: torch.empty(B, dtype=dtype, device=p.z1.device)  # noqa: E731
        return cls(new(wide), new(wide), new(wide), new(wide), new(wide), new(p.acc))


@dataclass
class State:
    """Per-row and per-column results that the kernels fill; None where not needed. All (B,) or (N,)."""

    r2: Tensor
    coef: Tensor | float
    loss: Tensor
    # s_i,pos straight from the embeddings: a 16-bit panel has rounded it, and the loss is most sensitive there; and the
    # columns of a symmetric loss compare with s_jj before their panel comes. None: taken from the panel.
    s_pos: Tensor | None = None
    T: Tensor | None = None  # the panel's similarities by a guide (c, N)
    dlogit: Tensor | None = None  # (p.gradients, B): of the logit's numbers
    sums: LogSums | None = None


class Kernels(Products):
    """What a backend brings. All work in place on tensors of the driver's; ``i0`` is the panel's first row."""

    temporaries: ClassVar[int] = 0
    statistics: ClassVar[torch.dtype | None] = None  # of the symmetric log-sums; None: the accumulation type

    def __init__(self, p: Pairs, state: State) -> None:
        raise NotImplementedError

    def similarities(self, z1hat: Tensor, z2: Tensor, out: Tensor) -> Tensor:
        return self.product(z1hat, z2.t(), out)

    def fused_rows(self, z1hat: Tensor, S: Tensor, i0: int, grad: bool) -> Tensor | None:
        """similarities and rows in one kernel, or the two in turn."""
        self.similarities(z1hat, self.p.z2, S)
        return self.rows(S, i0, grad)

    def rows(self, S: Tensor, i0: int, grad: bool) -> Tensor | None:
        """Losses of the panel's rows; with ``grad`` G over S. Returns f where G lacks the rows' factors."""
        raise NotImplementedError

    def positives(self, z1hat: Tensor, i0: int) -> None:
        """state.s_pos of the panel's rows."""
        p, part = self.p, slice(i0, i0 + z1hat.shape[0])
        assert self.state.s_pos is not None
        if p.positives is None:
            keys, r = p.z2[part], self.state.r2[part]
        else:
            j = p.positives[part].clamp(0, p.z2.shape[0] - 1)
            keys, r = p.z2[j], self.state.r2[j]
        self.state.s_pos[part] = (z1hat.to(p.acc) * keys.to(p.acc)).sum(1) * r

    def columns(self, S: Tensor, i0: int) -> None:
        """Folds the panel into the columns' running maxima and sums."""
        raise NotImplementedError

    def symmetric(self, S: Tensor, i0: int) -> None:
        """G of the symmetric loss over S, complete."""
        raise NotImplementedError

    def fused_sums(self, z1hat: Tensor, S: Tensor, i0: int) -> None:
        """similarities, then rows without gradient and columns, in one kernel or in turn."""
        self.similarities(z1hat, self.p.z2, S)
        self.rows(S, i0, False)
        self.columns(S, i0)

    def keeps_similarities(self) -> bool:
        """Whether fused_sums leaves the similarities in S."""
        return True

    def fused_symmetric(self, z1hat: Tensor, S: Tensor, i0: int) -> None:
        """similarities and symmetric in one kernel, or the two in turn."""
        self.symmetric(self.similarities(z1hat, self.p.z2, S), i0)

    p: Pairs
    state: State


def panel_rows(B: int, N: int, p: Pairs, temporaries: int) -> int:
    """c: how many rows fit in a panel's bytes, between 64 and 2048; on a GPU, products.panel_rows."""
    if p.z1.is_cuda:
        return products.panel_rows(B, N, p.z1.shape[1], p.z1.element_size())
    row_bytes = N * (p.z1.element_size() + (temporaries + p.guided) * p.acc.itemsize)
    most = max(PANEL_BYTES, (B + N) * p.z1.shape[1] * p.z1.element_size() // INPUT_SHARE)
    c = max(64, min(2048 if p.z1.dtype == torch.bfloat16 else 1024, most // row_bytes))
    return B if c >= B else c


def contrastive(p: Pairs, kernels: type[Kernels]) -> Result:
    z1, z2, own = p.z1, p.z2, p.mine
    B, D, N, count = p.B, z1.shape[1], z2.shape[0], own.stop - own.start
    new = lambda *shape, dtype=p.acc: torch.empty(shape, dtype=dtype, device=z1.device)  # noqa: E731

    grad = p.needs.z1 or p.needs.z2 or p.trained
    state = State(r2=new(N), coef=p.placed(p.row_coefficients()), loss=new(B))
    state.dlogit = new(p.gradients, B) if p.trained else None
    if p.one_positive and (z1.dtype == torch.bfloat16 or (p.symmetric and p.excludes)):
        state.s_pos = new(B)
    if p.symmetric:
        state.sums = LogSums.empty(B, kernels.statistics or p.acc, p)
    k = kernels(p, state)
    r2, far = state.r2, None
    if not p.normalize:
        r2.fill_(1)
    elif far := k.normalize(z2, r2, None):  # a key's product may overflow: all of them from a normalised copy
        r2, p.z2 = r2.clone(), k.empty(N, D, dtype=z2.dtype)
        k.normalize(z2, None, p.z2)
        state.r2.fill_(1)

    c = panel_rows(count, N, p, k.temporaries)
    r1, panel = new(c), k.empty(c, products.row_stride(N, z1.device, z1.element_size()), dtype=z1.dtype)[:, :N]
    guide = Guide(p, k, c) if p.guided else None
    z1hat_panel = new(c, D, dtype=z1.dtype) if p.normalize else None

    def panels():
        """Panels in turn: first row, z1[I], z1hat[I], r1[I], S[I]."""
        for i0 in range(own.start, own.stop, c):
            n = min(c, own.stop - i0)
            z = p.rows_of(z1, i0, n)
            z1hat = z
            if z1hat_panel is not None:
                z1hat = z1hat_panel[:n]
                k.normalize(z, r1[:n], z1hat)
            if state.s_pos is not None:
                k.positives(z1hat, i0)
            if guide is not None:
                state.T = guide.panel(i0, n)
            yield i0, z, z1hat, r1[:n], panel[:n]

    if p.symmetric:
        _log_sums(p, k, state, panels)

    # Keys that are the rows: both gradients in one sum, in the units of the keys'.
    one_sum = p.same and p.needs.z1
    dz1 = k.empty(c if one_sum else z1.shape[0], D, dtype=z1.dtype) if p.needs.z1 else None
    if dz1 is not None and not one_sum and z1.shape[0] > count:
        dz1.zero_()
    g2 = KeyGradient(z2, k, single=c == count and not one_sum) if p.needs.z2 or one_sum else None
    if grad or not p.symmetric:
        for i0, z, z1hat, r, S in panels():
            f: Tensor | None = None
            if p.symmetric and c == count and k.keeps_similarities():  # of the first sweep
                k.symmetric(S, i0)
            elif p.symmetric:
                k.fused_symmetric(z1hat, S, i0)
            else:
                f = k.fused_rows(z1hat, S, i0, grad)
            if dz1 is not None:
                first = 0 if one_sum else i0 - p.first
                part = dz1[first : first + S.shape[0]]
                g1 = k.product(S, p.z2, part)
                if p.normalize and not one_sum:
                    k.project(z, g1, r, part, f)
                elif f is not None:
                    g1.mul_(f[:, None])
            if g2 is not None:
                if f is not None:
                    z1hat = torch.mul(z1hat, f[:, None], out=z1hat if p.normalize else torch.empty_like(z1hat))
                g2.add(S, z1hat)
                if one_sum:
                    g2.add_scaled(i0, g1, r if p.normalize and not far else None)

    dz2: Tensor | None = None
    if g2 is not None:
        total = g2.total
        dz2 = total if total.dtype == z2.dtype and total.is_contiguous() else k.empty(N, D, dtype=z2.dtype)
        if p.normalize:
            k.project(z2, total, r2, dz2, scaled=not far)
        elif dz2 is not total:
            dz2.copy_(total)
    if one_sum:
        dz1, dz2 = dz2, None
    return p.result(state.loss[own], dz1, dz2, None if state.dlogit is None else state.dlogit[:, own])


class Guide:
    """Panels of T, similarities by guides: a product of their own, or rows of what was given."""

    def __init__(self, p: Pairs, k: Products, c: int) -> None:
        self.p, self.k = p, k
        self.memory: Tensor | None = None
        if p.guide_logits is not None:
            in_place = p.guide_logits.stride(1) == 1 and p.guide_logits.dtype in (torch.float32, p.acc)
            if not in_place:
                self.memory = k.empty(c, p.z2.shape[0], dtype=p.acc)
        else:
            assert p.guide_queries is not None
            self.memory = k.empty(c, p.z2.shape[0], dtype=p.guide_queries.dtype)

    def panel(self, i0: int, n: int) -> Tensor:
        p = self.p
        if p.guide_logits is not None:
            rows = p.rows_of(p.guide_logits, i0, n)
            return rows if self.memory is None else self.memory[:n].copy_(rows)
        assert p.guide_queries is not None and p.guide_keys is not None and self.memory is not None
        return self.k.product(p.rows_of(p.guide_queries, i0, n), p.guide_keys.t(), self.memory[:n])


class KeyGradient:
    """The sum over panels of G^T z1hat, (N, D), in the accumulation type; the first panel writes instead of adding.

    16-bit panels: their sum stays in fp32; on a GPU the product adds to it, elsewhere it is rounded once before. On a
    CPU they are accumulated transposed, as z1hat^T G with z1hat^T copied: oneDNN is 1.5 to 2 times slower on a
    transposed G (docs/performance.md).

    Args:
        keys: (N, D). single: there is one panel.
        out: (N, D), where the sum is made if it has its type; by default memory of its own.
    """

    def __init__(self, keys: Tensor, kernels: Products, single: bool, out: Tensor | None = None) -> None:
        (self.N, self.D), self.dtype, self.k, self.single = keys.shape, keys.dtype, kernels, single
        self.wide = self.dtype in (torch.float32, torch.float64)
        self.out = out if self.wide else None
        self.transposed = not self.wide and keys.device.type == "cpu" and self.N >= 1024
        self.sum: Tensor | None = None
        self.product: Tensor | None = None

    def begin(self) -> None:
        """Zeros, for sums that others than ``add`` write to as well."""
        shape = (self.D, self.N) if self.transposed else (self.N, self.D)
        self.sum = self.k.empty(*shape, dtype=self.dtype if self.wide else torch.float32).zero_()

    def add(self, G: Tensor, z1hat: Tensor) -> None:
        if self.wide:
            if self.sum is None:
                out = self.k.empty(self.N, self.D, dtype=self.dtype) if self.out is None else self.out
                self.sum = self.k.product(G.t(), z1hat, out)
            else:
                self.k.add_product(self.sum, G.t(), z1hat)
            return
        if not self.single and products.sums_in_float32(G.device):
            if self.sum is None:
                self.sum = self.k.empty(self.N, self.D, dtype=torch.float32)
                torch.mm(G.t(), z1hat, out_dtype=torch.float32, out=self.sum)
            else:
                self.k.add_product(self.sum, G.t(), z1hat)
            return
        left, right = (z1hat.t().contiguous(), G) if self.transposed else (G.t(), z1hat)
        if self.product is None:
            shape = (self.D, self.N) if self.transposed else (self.N, self.D)
            self.product = self.k.empty(*shape, dtype=self.dtype)
        torch.mm(left, right, out=self.product)
        if self.sum is not None:
            self.sum.add_(self.product)
        else:
            self.sum = self.product
            if not self.single:
                self.sum = self.k.empty(*self.product.shape, dtype=torch.float32).copy_(self.product)

    def add_rows(self, i0: int, G: Tensor, keys: Tensor) -> None:
        """G keys to the rows from i0 on, where rows are keys too; after ``begin`` or the first ``add``."""
        self.k.add_product(self.total[i0 : i0 + G.shape[0]], G, keys)

    def add_scaled(self, i0: int, g: Tensor, factors: Tensor | None) -> None:
        """g to the rows from i0 on, each times its factor."""
        part, g = self.total[i0 : i0 + g.shape[0]], g.to(self.total.dtype)
        if factors is None:
            part += g
        else:
            part.addcmul_(g, factors.to(self.total.dtype)[:, None])

    @property
    def total(self) -> Tensor:
        assert self.sum is not None
        return self.sum.t() if self.transposed else self.sum


def _log_sums(p: Pairs, k: Kernels, state: State, panels) -> None:
    """The first symmetric sweep: log-sums over the negatives of each row and column, and the losses."""
    sums = state.sums
    assert sums is not None
    sums.column_max.fill_(-torch.inf)
    sums.column_sum.zero_()
    if p.excludes:
        for _ in panels():  # every s_jj before the first column
            pass
    for i0, _, z1hat, _, S in panels():
        k.fused_sums(z1hat, S, i0)
    torch.add(sums.column_sum.log2(), sums.column_max, out=sums.lneg_column).mul_(math.log(2))
    sums.lneg_column.masked_fill_(sums.column_sum == 0, -torch.inf)
    sums.lse_column.copy_(torch.logaddexp(sums.lneg_column, sums.lpos))
    d = sums.lneg_column - sums.lpos
    state.loss.add_(torch.logaddexp(torch.zeros_like(d), d)).div_(2)
