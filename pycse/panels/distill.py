"""Distillation by row panels: the student's one-view similarities against the averaged similarities of the teachers.

    for each panel I of c rows:
        S      = zhat[I] zhat^T                     GEMM   2 c B D
        T      = sum_k w_k ehat^k[I] ehat^k^T       GEMM   2 c B sum_k D_k
        rows   S, T -> losses, G = dL/ds over S
        g     += G^T zhat[I];  g[I] += G zhat       GEMM   4 c B D     dz = project(g) at the end

O(c B) memory beside one normalised copy of z. A batch that fits one panel is symmetric: g = (G + G^T) zhat, one
product, and only the upper blocks of T and S are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycse.panels import products
from pycse.panels.contrastive import KeyGradient
from pycse.panels.products import Products
from pycse.problem import Distillation, Result

PANEL_BYTES = 48 << 20  # of S and T together
TEACHER_BYTES = 64 << 20  # up to which the teachers' normalised copies are kept, side by side: one product makes T
TEACHER_BLOCK = 1024  # keys of a teacher normalised at a time, beyond
GPU_TEACHER_BYTES, GPU_TEACHER_BLOCK = 1 << 30, 1 << 16  # a launch costs more there than memory
SYMMETRIC_BLOCK = 128  # rows of the blocks above the diagonal that a one-panel batch computes


@dataclass
class State:
    coef: Tensor | float  # dLoss/dL_i
    loss: Tensor  # (B,)


class Kernels(Products):
    """What a backend brings: ``rows`` turns S into G in place, given T, and fills the panel's part of state.loss."""

    temporaries: ClassVar[int] = 0

    def __init__(self, d: Distillation, state: State) -> None:
        raise NotImplementedError

    def rows(self, S: Tensor, T: Tensor, i0: int, grad: bool) -> None:
        raise NotImplementedError

    def symmetrize(self, G: Tensor) -> Tensor:
        """G + G^T."""
        return G + G.t()

    d: Distillation
    state: State


def panel_rows(d: Distillation, temporaries: int) -> int:
    B, rows = d.B, d.mine.stop - d.mine.start
    if d.z1.is_cuda:
        return products.panel_rows(rows, B, d.z1.shape[1], 2 * d.z1.element_size())
    row_bytes = B * (d.z1.element_size() + (1 + temporaries) * d.acc.itemsize)
    c = max(64, min(1024, PANEL_BYTES // row_bytes))
    return rows if rows * row_bytes <= PANEL_BYTES else min(c, rows)


def joins(d: Distillation) -> bool:
    """Whether a launch costs more than a copy of the teachers."""
    return d.z1.is_cuda


def gram(k: Products, unit: Tensor, out: Tensor, block: int = SYMMETRIC_BLOCK) -> Tensor:
    """out = unit unit^T: the blocks from the diagonal on, mirrored."""
    B = unit.shape[0]
    if 2 * block > B or unit.is_cuda:  # half the arithmetic is not worth the launches
        return k.product(unit, unit.t(), out)
    for i in range(0, B, block):
        j = min(i + block, B)
        k.product(unit[i:j], unit[i:].t(), out[i:j, i:])
        out[j:, i:j].copy_(out[i:j, j:].t())
    return out


class Teachers:
    """Panels of T: c x B similarities in float32, float64 or, where one product of bfloat16 makes them, bfloat16."""

    def __init__(self, d: Distillation, k: Kernels, c: int) -> None:
        self.d, self.k, self.B = d, k, d.B
        self.units: Tensor | None = None
        if d.logits is not None:
            in_place = d.logits.stride(1) == 1 and d.logits.dtype in (torch.float32, d.acc)
            self.memory = None if in_place else k.empty(c, self.B, dtype=d.acc)
            return
        dtype = d.teachers[0].dtype
        for e in d.teachers:
            dtype = torch.promote_types(dtype, e.dtype)
        self.teachers = [e.to(dtype) for e in d.teachers]
        widths = [e.shape[1] for e in self.teachers]
        most, self.block = (GPU_TEACHER_BYTES, GPU_TEACHER_BLOCK) if d.z1.is_cuda else (TEACHER_BYTES, TEACHER_BLOCK)
        if self.B * sum(widths) * dtype.itemsize <= most:
            self.units = self._side_by_side(widths, dtype)
            self.memory = k.empty(c, self.B, dtype=dtype)
        else:
            self.memory = k.empty(c, self.B, dtype=torch.promote_types(dtype, torch.float32))

    def panel(self, i0: int, n: int) -> Tensor:
        """T of rows [i0, i0 + n)."""
        d = self.d
        if self.memory is None:
            assert d.logits is not None
            return d.logits[i0 : i0 + n]
        out = self.memory[:n]
        if d.logits is not None:
            return out.copy_(d.logits[i0 : i0 + n])
        if self.units is not None:
            return (
                gram(self.k, self.units, out)
                if n == self.B
                else self.k.product(self.units[i0 : i0 + n], self.units.t(), out)
            )
        out.zero_()
        for e, w in zip(self.teachers, d.teacher_weights):
            rows = self._unit(e[i0 : i0 + n], w**0.5)
            for j in range(0, self.B, self.block):
                keys = self._unit(e[j : j + self.block], w**0.5)
                self.k.add_product(out[:, j : j + self.block], rows, keys.t())
        return out

    def _side_by_side(self, widths: list[int], dtype: torch.dtype) -> Tensor:
        """sqrt(w_k) ehat^k along features. Teachers that are alike are one matrix of B K rows: two launches for any
        K."""
        weights = self.d.teacher_weights
        units = self.k.empty(self.B, sum(widths), dtype=dtype)
        if joins(self.d) and len(widths) > 2 and len(set(widths)) == len(set(weights)) == 1:
            rows = torch.cat(self.teachers, 1).view(-1, widths[0])
            self.k.normalize(rows, None, units.view(-1, widths[0]), weights[0] ** 0.5)
        else:
            for e, w, part in zip(self.teachers, weights, units.split(widths, 1)):
                self.k.normalize(e, None, part, w**0.5)
        return units

    def _unit(self, e: Tensor, factor: float) -> Tensor:
        out = torch.empty(e.shape, dtype=e.dtype, device=e.device)
        self.k.normalize(e, None, out, factor)
        return out


def distill(d: Distillation, kernels: type[Kernels]) -> Result:
    z, own = d.z1, d.mine
    B, D = z.shape
    new = lambda *shape, dtype=d.acc: torch.empty(shape, dtype=dtype, device=z.device)  # noqa: E731
    if B == 1:  # no pair
        return Result(new(own.stop - own.start).zero_(), torch.zeros_like(z) if d.need else None)
    state = State(d.placed(d.row_coefficients() * d.factor), new(B))
    k = kernels(d, state)
    zhat, r = z, new(B)
    if d.normalize:
        zhat = k.empty(B, D, dtype=z.dtype)
        k.normalize(z, r, zhat)
    c = panel_rows(d, k.temporaries)
    teachers, S = Teachers(d, k, c), k.empty(c, B, dtype=z.dtype)
    if c == B:
        gram(k, zhat, S)
        k.rows(S, teachers.panel(0, B), 0, d.need)
        if not d.need:
            return Result(state.loss[own])
        total = k.product(k.symmetrize(S), zhat, k.empty(B, D, dtype=z.dtype))
    else:
        g = KeyGradient(zhat, k, single=False)
        for i0 in range(own.start, own.stop, c):
            part = zhat[i0 : min(i0 + c, own.stop)]
            n = part.shape[0]
            k.product(part, zhat.t(), S[:n])
            k.rows(S[:n], teachers.panel(i0, n), i0, d.need)
            if d.need:
                g.add(S[:n], part)
                g.add_rows(i0, S[:n], zhat)
        if not d.need:
            return Result(state.loss[own])
        total = g.total
    if not d.normalize:
        return Result(state.loss[own], total.to(z.dtype).contiguous())
    dz = total if total.dtype == z.dtype and total.is_contiguous() else k.empty(B, D, dtype=z.dtype)
    k.project(z, total, r, dz)
    return Result(state.loss[own], dz)
