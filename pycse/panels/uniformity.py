"""Uniformity by row panels: only pairs i <= j are computed, and nothing N x N is kept.

    for each panel I of c rows, against the keys from its first row on:
        S      = zhat[I] zhat[i0:]^T      GEMM   2 c n D     n = N - i0
        rows   S -> E over S, E_ij = exp(-t |zhat_i - zhat_j|^2) times a constant, 0 on the diagonal; its row sums
        g[I]  += E zhat[i0:]              GEMM   2 c n D
        g[J]  += E_J^T zhat[I]            GEMM   2 c n D     J: the keys behind the panel's own rows
    dz = project(4 t g / sum E)

3 N^2 D operations, O(c N) memory beside one normalised copy of z. A batch that fits one panel is one symmetric product.
Rows of other processes follow z's as keys. Of a pair with one of them only the half that is a row of z's counts, and
their gradient is their own process': 4 operations an element there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycse.panels import products
from pycse.panels.contrastive import PANEL_BYTES
from pycse.panels.distill import gram
from pycse.panels.products import Products
from pycse.problem import Result, Uniformity

LOG2E = 1 / math.log(2)


class Kernels(Products):
    """What a backend brings besides norms."""

    temporaries = 0

    def __init__(self, p: Uniformity, bias: Tensor, sums: Tensor) -> None:
        raise NotImplementedError

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        """The panel of rows I and keys [i0, N). Fills sums[I] with sum_j 2^(u S_ij + bias_i + bias_j), u = 2 t / log 2,
        where the diagonal counts 0 and a key behind the panel's rows, which stands for its mirror image too, twice;
        with ``grad`` the terms over S."""
        raise NotImplementedError


def panel_rows(p: Uniformity, temporaries: int) -> int:
    own = p.z.shape[0]
    N = own + (0 if p.others is None else p.others.shape[0])
    if p.z.is_cuda:
        return products.panel_rows(own, N, p.z.shape[1], p.z.element_size())
    row_bytes = N * (p.z.element_size() + temporaries * p.acc.itemsize)
    return own if own * row_bytes <= PANEL_BYTES else max(64, min(1024, PANEL_BYTES // row_bytes))


def uniformity(p: Uniformity, kernels: type[Kernels]) -> Result:
    z, t = p.z, p.t
    own, D = z.shape
    N = own + (0 if p.others is None else p.others.shape[0])
    new = lambda *shape: torch.empty(shape, dtype=p.acc, device=z.device)  # noqa: E731
    bias, sums = new(N), new(N)
    k = kernels(p, bias, sums)
    zhat, r = z, None
    if p.normalize:
        zhat, r = k.empty(N, D, dtype=z.dtype), new(N)
        k.normalize(z, r[:own], zhat[:own])
        if p.others is not None and own < N:
            k.normalize(p.others, r[own:], zhat[own:])
    elif p.others is not None:
        zhat = torch.cat((z, p.others))
    c = panel_rows(p, k.temporaries)
    panel = k.empty(c * N, dtype=z.dtype)

    def panels():
        for i0 in range(0, own, c):
            rows = min(c, own - i0)
            S = panel[: rows * (N - i0)].view(rows, N - i0)  # contiguous: shorter rows pack closer
            yield i0, gram(k, zhat, S) if c == N else k.product(zhat[i0 : i0 + rows], zhat[i0:].t(), S)

    # The exponent 2t s - t |zhat_i|^2 - t |zhat_j|^2 is moved to the middle of its range, [-2t, 2t] for unit rows.
    squares = (r != 0).to(p.acc) if r is not None else torch.linalg.vector_norm(zhat, dim=1, dtype=p.acc).square_()
    half: float | Tensor = t
    if not p.bounded:
        top = torch.full((), -torch.inf, dtype=p.acc, device=z.device)
        for i0, S in panels():
            rows, keys = squares[i0 : i0 + S.shape[0], None], squares[i0:]
            exponent = 2 * S.to(p.acc) - rows - keys
            exponent.diagonal().fill_(-torch.inf)
            top = torch.maximum(top, exponent.amax())
        half = top * (-t / 2)
    torch.mul(squares, -t, out=bias).add_(half).mul_(LOG2E)
    bias[own:] -= 1  # the kernel counts them twice

    g = k.empty(own, D, dtype=p.acc) if p.need else None
    mass = new(own).zero_() if p.need and not p.normalize else None  # sum_j E_ij
    for i0, S in panels():
        k.rows(S, i0, p.need)
        S[:, own - i0 :].mul_(2)
        if g is not None:
            _accumulate(k, g, S, zhat, i0)
        if mass is not None:
            c = S.shape[0]
            mass[i0 : i0 + c].add_(S.sum(1, dtype=p.acc))
            mass[i0 + c :].add_(S[:, c : own - i0].sum(0, dtype=p.acc))
    total = sums[:own].sum(dtype=torch.float64)
    loss = (total.log() - 2 * half - math.log(N * (N - 1))).to(p.acc)
    if g is None:
        return Result(sums, loss=loss)
    f = (4 * t / total).to(p.acc)
    if r is not None:
        dz = g if g.dtype == z.dtype else k.empty(own, D, dtype=z.dtype)
        k.project(z, g, r[:own], dz, f.expand(own).contiguous())
        return Result(sums, dz, loss=loss)
    assert mass is not None
    return Result(sums, g.addcmul_(z, mass[:, None], value=-1).mul_(f).to(z.dtype), loss=loss)


def _accumulate(k: Products, g: Tensor, E: Tensor, zhat: Tensor, i0: int) -> None:
    """The panel's part of g, in the accumulation type; the first panel writes instead of adding."""
    c = E.shape[0]
    own, keys, rows = g[i0 : i0 + c], zhat[i0:], zhat[i0 : i0 + c]
    behind, mirrored = g[i0 + c :], E[:, c : len(g) - i0]
    if g.dtype == E.dtype:
        if i0 == 0:
            k.product(E, keys, own)
            k.product(mirrored.t(), rows, behind)
        else:
            k.add_product(own, E, keys)
            k.add_product(behind, mirrored.t(), rows)
        return
    if i0 == 0:
        g.zero_()
    k.add_product(own, E, keys)
    if g.device.type == "cpu":  # oneDNN is slow on a transposed E (panels/contrastive.py)
        behind.add_(torch.mm(rows.t().contiguous(), mirrored).t())
    else:
        k.add_product(behind, mirrored.t(), rows)
