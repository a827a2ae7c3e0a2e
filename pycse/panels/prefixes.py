"""A contrastive loss at several lengths d_1 < ... < d_K: of the first d_k features of rows and keys, for each k.

Similarities of a length are sums over blocks of features, b: those from d_{b-1} to d_b. So all lengths share the
products of one loss. With z1hat the panel's rows over their whole norms, rho^k and r^k the inverse norms of prefixes of
z1hat and z2, and w_k the lengths' weights:

    for each panel I of c rows:
        S^b    = z1hat[I, b] z2[:, b]^T                   GEMMs  2 c N D
        visit  s^k_ij = rho^k_i r^k_j sum_{b <= k} S^b_ij -> losses; then S^b becomes H^b = sum_{k >= b} w_k G^k
        g1[b]  = H^b z2[:, b]                             GEMMs  2 c N D    dz1[I, b] = r1 (g1[b] - z1hat[b] T^b)
        g2[b] += H^b^T z1hat[I, b]                        GEMMs  2 c N D    dz2[:, b] = g2[b] - z2[:, b] C^b at the end

G^k = dL^k/d sum_{b <= k} S^b; the norms' own gradients are T^b = sum_{k >= b} (rho^k)^2 w_k t^k, t^k_i = sum_j P s l'
of the row, and C^b likewise of the keys' columns. 6 N^2 D operations for all lengths, O(K c N) memory. Rows and columns
of a symmetric loss are two such sweeps, 12 N^2 D. A batch that fits in cache is one call of its own (``small``).

What the visit does not have (parts of panels/parts.py, more lengths than fit, a length of 1, rows whose prefix is null
beside the rest) is computed length by length, sum_k d_k / D of one loss' products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycse.panels import products
from pycse.panels.contrastive import Guide, KeyGradient
from pycse.panels.products import Products
from pycse.problem import Contrastive, Lengths, Result

PANEL_BYTES = 112 << 20  # of all lengths' panels: products of fewer rows are slower (docs/performance.md)
MOST_ROWS = 1024


class Whole(NamedTuple):
    """What becomes of a batch: losses of each length (K, B), gradients, and those of the logits' numbers."""

    losses: Tensor
    dz1: Tensor | None
    dz2: Tensor | None
    dlogits: Tensor | None  # (K, p.gradients, B)


@dataclass
class States:
    """What kernels fill, and what they need of rows, for all lengths; as panels/contrastive.py has it for one."""

    weights: list[float]  # of the lengths
    coef: Tensor | float  # dLoss/dL_i but for them
    r2: Tensor  # (K, N)
    loss: Tensor  # (K, B)
    s_pos: Tensor | None  # (K, B), of 16-bit panels
    dlogit: Tensor | None  # (K, p.gradients, B)


class Kernels(Products):
    """What a backend brings: ``visit`` for panels (K, c, N) of the blocks' products."""

    most: int  # lengths

    @classmethod
    def small(cls, p: Contrastive, dims: list[int], problems: list[Contrastive], weights: list[float]) -> Whole | None:
        """The whole computation of a batch for which panels are too much work, if it is one."""
        return None

    @staticmethod
    def place(z: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Where its kernels run."""
        return contextlib.nullcontext()

    def __init__(self, problems: list[Contrastive], states: States) -> None:
        raise NotImplementedError

    def visit(
        self, S: Tensor, rho: Tensor, i0: int, t: Tensor | None, columns: Tensor | None, T: Tensor | None
    ) -> None:
        """The states' losses of rows I. With t (K, c) and columns (K, N), which it adds to: H over S, and norms' part.

        Args:
            S: (K, c, N). rho: (K, c) inverse norms of the rows' prefixes.
            T: (c, N) similarities by a guide.
        """
        raise NotImplementedError


def matryoshka(
    p: Contrastive,
    lengths: Lengths,
    run: Callable[[Contrastive], Result],
    kernels: type[Kernels] | None,
    differentiable: bool,
) -> tuple[Result, Tensor]:
    """The weighted sum's losses and gradients, and the losses of each length, (K, B).

    Args:
        run: a backend's contrastive loss. kernels: what it brings for all lengths at once, if it does.
        differentiable: by PyTorch itself, so that nothing is detached.
    """
    result = None
    # Of one feature a normalised row is its sign, whose gradient is 0: here it would be what rounding leaves of it.
    signs = p.normalize and 1 in lengths.dims
    if kernels is not None and not (p.in_parts or signs) and len(lengths.dims) <= kernels.most:
        result = (_both_ways if p.symmetric else together)(p, lengths, kernels)
    return one_by_one(p, lengths, run, differentiable) if result is None else result


def panel_rows(p: Contrastive, K: int) -> int:
    """c: as many as fit, in panels of one size."""
    rows, keys = p.mine.stop - p.mine.start, K * p.z2.shape[0]
    if p.z1.is_cuda:
        return products.panel_rows(rows, keys, p.z1.shape[1], p.z1.element_size())
    fits = max(64, min(MOST_ROWS, PANEL_BYTES // (keys * p.z1.element_size())) // 16 * 16)
    each = -(-rows // -(-rows // fits))
    return min(rows, -(-each // 16) * 16)


def together(p: Contrastive, lengths: Lengths, kernels: type[Kernels]) -> tuple[Result, Tensor] | None:
    """All lengths from one loss' products, unless ``by_panels`` cannot. Below, lengths are ascending."""
    order = sorted(range(len(lengths.dims)), key=lengths.dims.__getitem__)
    dims, weights = [lengths.dims[k] for k in order], [lengths.dim_weights[k] for k in order]
    problems = [lengths.problem(p, k) for k in order]
    with kernels.place(p.z1):
        whole = kernels.small(p, dims, problems, weights) or by_panels(p, dims, problems, weights, kernels)
    if whole is None:
        return None
    total = weighted_sum(whole.losses, weights)
    result = Result(total, whole.dz1, whole.dz2)
    place = sorted(range(len(order)), key=order.__getitem__)  # of a length as it was given
    if whole.dlogits is not None:
        parts = [problems[k].result(total, None, None, whole.dlogits[k]) for k in place]
        dtemperature, dm = _numbers(lengths, parts)
        result = result._replace(dtemperature=dtemperature, dm=dm)
    if place == sorted(place):
        return result, whole.losses
    return result, torch.stack([whole.losses[k] for k in place])


def weighted_sum(losses: Tensor, weights: list[float]) -> Tensor:
    """Of (K, B) losses, (B,)."""
    if all(w == 1 for w in weights):
        return losses.sum(0)
    total = losses[0] * weights[0]
    for one, w in zip(losses[1:], weights[1:]):
        total = total.add(one, alpha=w)
    return total


def by_panels(
    p: Contrastive, dims: list[int], problems: list[Contrastive], weights: list[float], kernels: type[Kernels]
) -> Whole | None:
    """None where a prefix is too small a part of its normalised row to have a norm of its own."""
    blocks = [slice(a, b) for a, b in zip([0, *dims], dims)]
    z1, own = p.z1, p.mine
    B, N, K, D, count = p.B, p.z2.shape[0], len(dims), dims[-1], own.stop - own.start
    new = lambda *shape: torch.empty(shape, dtype=p.acc, device=z1.device)  # noqa: E731
    grad = p.needs.z1 or p.needs.z2 or p.trained
    coef, r2 = p.placed(p.row_coefficients()), new(K, N)
    dlogit = new(K, p.gradients, B) if p.trained else None
    states = States(weights, coef, r2, new(K, B), new(K, B) if z1.dtype == torch.bfloat16 else None, dlogit)
    k = kernels(problems, states)
    z2, r_far, fine = _keys(p, dims, r2, k)
    if not fine:
        return None

    c = panel_rows(p, K)
    stride = products.row_stride(N, z1.device, z1.element_size())
    panels, r1, rho = k.empty(K, c, stride, dtype=z1.dtype)[:, :, :N], new(c), new(K, c)
    z1hat = k.empty(c, D, dtype=z1.dtype) if p.normalize else None
    t, columns = (new(K, c), new(K, N).zero_()) if grad else (None, None)
    guide = Guide(p, k, c) if p.guided else None
    dz1 = k.empty(*z1.shape, dtype=z1.dtype) if p.needs.z1 else None
    if dz1 is not None:  # features beyond the longest, and rows of other processes
        (dz1 if z1.shape[0] > count else dz1[:, D:]).zero_()
    dz2 = k.empty(*p.z2.shape, dtype=z1.dtype) if p.needs.z2 else None
    sums = [KeyGradient(z2[:, b], k, c == count, out=dz2[:, b]) for b in blocks] if dz2 is not None else None
    for i0 in range(own.start, own.stop, c):
        n = min(c, own.stop - i0)
        z, rho_n = p.rows_of(z1, i0, n)[:, :D], rho.view(-1)[: K * n].view(K, n)
        if z1hat is None:
            rho_n.fill_(1)
        else:
            given, z = z, z1hat[:n]
            k.normalize(given, r1[:n], z)
            if not _norms(k, dims, given, z, r1[:n], rho_n):
                return None
        S = panels[:, :n]
        for b, panel in zip(blocks, S):
            k.product(z[:, b], z2[:, b].t(), panel)
        if states.s_pos is not None:
            _positives(p, z, z2, i0, dims, rho_n, states)
        t_n = None if t is None else t.view(-1)[: K * n].view(K, n)
        k.visit(S, rho_n, i0, t_n, columns, None if guide is None else guide.panel(i0, n))
        if dz1 is not None:
            assert t_n is not None
            norms, at = _of_norms(rho_n, t_n), i0 - p.first
            for b, panel, of_norms in zip(blocks, S, norms):
                g1 = k.product(panel, z2[:, b], dz1[at : at + n, b])
                if p.normalize:
                    _project(g1, z[:, b], of_norms, r1[:n], g1)
        if sums is not None:
            for total, panel, b in zip(sums, S, blocks):
                total.add(panel, z[:, b])

    if sums is not None:
        assert columns is not None and dz2 is not None
        dz2[:, D:].zero_()
        for b, total, of_norms in zip(blocks, sums, _of_norms(r2, columns)):
            if p.normalize:
                _project(total.total, z2[:, b], of_norms, r_far, dz2[:, b])
            elif total.total is not total.out:
                dz2[:, b] = total.total
    return Whole(states.loss[:, own], dz1, dz2, None if dlogit is None else dlogit[:, :, own])


def _keys(p: Contrastive, dims: list[int], r2: Tensor, k: Kernels) -> tuple[Tensor, Tensor | None, bool]:
    """The keys as products take them, with the inverse norms of their prefixes in r2; where they had to be normalised
    for that, what r was; and whether the norms are those of the keys' own prefixes."""
    z2 = p.z2[:, : dims[-1]]
    if not p.normalize:
        r2.fill_(1)
        return z2, None, True
    far = [k.normalize(z2[:, :d], r, None) for d, r in zip(dims, r2)]
    if not any(far):
        return z2, None, True
    # A key's product may overflow: all of them from a normalised copy.
    r, copy = r2[-1].clone(), k.empty(*z2.shape, dtype=z2.dtype)
    k.normalize(z2, None, copy)
    return copy, r, _norms(k, dims, z2, copy, r, r2)


TINY = 1e-12  # norms up to this are 0 (kernels/cpu/norms.h)


def _norms(k: Kernels, dims: list[int], z: Tensor, zhat: Tensor, r: Tensor, rho: Tensor) -> bool:
    """rho = the inverse norms of the prefixes of zhat = r z, 0 where z's own are null. Returns whether no other is 0: a
    prefix may be null beside its row, and none by itself. On a GPU, which would have to be waited for, nobody looks."""
    for d, one in zip(dims, rho):
        k.normalize(zhat[:, :d], one, None)
    if rho.is_cuda:
        return True
    null = (rho == 0) | (rho * r >= 1 / TINY)
    if not null.any():
        return True
    own = torch.empty_like(rho)
    for d, one in zip(dims, own):
        k.normalize(z[:, :d], one, None)
    fine = not ((rho == 0) & (own != 0)).any()
    rho.mul_(own != 0)
    return fine


def _of_norms(r: Tensor, sums: Tensor) -> Tensor:
    """What the norms of all lengths that have a block take from its features' gradients, for each block: sums over
    k >= b of r_k^2 sums_k."""
    return (r.square() * sums).flip(0).cumsum(0).flip(0)


def _project(g: Tensor, z: Tensor, of_norms: Tensor, r: Tensor | None, out: Tensor) -> None:
    """out = r (g - of_norms z), in the accumulation type."""
    acc = of_norms.dtype
    if g.dtype == acc and g is out:
        g.addcmul_(z, of_norms[:, None], value=-1)
    else:
        g = torch.addcmul(g.to(acc), z.to(acc), of_norms[:, None], value=-1)
    if r is not None:
        g.mul_(r[:, None])
    if g is not out:
        out.copy_(g)


def _positives(
    p: Contrastive, z1hat: Tensor, z2: Tensor, i0: int, dims: list[int], rho: Tensor, states: States
) -> None:
    """The rows' similarities with their positives at each length, from the embeddings."""
    n, N = z1hat.shape[0], z2.shape[0]
    if p.positives is None:
        j = torch.arange(i0, i0 + n, dtype=torch.int64, device=z1hat.device)
    else:
        j = p.positives[i0 : i0 + n].clamp(0, N - 1)
    sums = (z1hat.to(p.acc) * z2[j].to(p.acc)).cumsum(1)
    assert states.s_pos is not None
    for d, of_rows, of_keys, s_pos in zip(dims, rho, states.r2, states.s_pos):
        s_pos[i0 : i0 + n] = sums[:, d - 1] * of_rows * of_keys[j]


def _both_ways(p: Contrastive, lengths: Lengths, kernels: type[Kernels]) -> tuple[Result, Tensor] | None:
    """A symmetric loss as the mean of that of its rows and that of its columns."""
    rows, half = p.copy(), replace(lengths, dim_weights=[w / 2 for w in lengths.dim_weights])
    rows.symmetric = False
    columns = rows.copy()
    columns.z1, columns.z2, columns.query_ids, columns.key_ids = p.z2, p.z1, p.key_ids, p.query_ids
    columns.needs = p.needs._replace(z1=p.needs.z2, z2=p.needs.z1)
    one, other = together(rows, half, kernels), together(columns, half, kernels)
    if one is None or other is None:
        return None
    (a, of_rows), (b, of_columns) = one, other
    result = Result(
        a.rows + b.rows, _sum(a.dz1, b.dz2), _sum(a.dz2, b.dz1), _sum(a.dtemperature, b.dtemperature), _sum(a.dm, b.dm)
    )
    return result, (of_rows + of_columns) / 2


def one_by_one(
    p: Contrastive, lengths: Lengths, run: Callable[[Contrastive], Result], differentiable: bool
) -> tuple[Result, Tensor]:
    rows: list[Tensor] = []
    dz1 = dz2 = total = None
    numbers = []
    for k, (d, weight) in enumerate(zip(lengths.dims, lengths.dim_weights)):
        out = run(lengths.problem(p, k))
        rows.append(out.rows)
        total = _sum(total, out.rows * weight)
        dz1, dz2 = _added(dz1, out.dz1, p.z1, d, weight), _added(dz2, out.dz2, p.z2, d, weight)
        numbers.append(out._replace(dtemperature=_times(out.dtemperature, weight), dm=_times(out.dm, weight)))
    assert total is not None
    if not differentiable:
        dz1, dz2 = (None if g is None else g.to(p.z1.dtype) for g in (dz1, dz2))
    return Result(total, dz1, dz2, *_numbers(lengths, numbers)), torch.stack(rows)


def _numbers(lengths: Lengths, parts: list[Result]) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of temperature, one or one a length, and m, from those of each length in the order given."""
    dm, dtemperature = None, None
    for part in parts:
        dm, dtemperature = _sum(dm, part.dm), _sum(dtemperature, part.dtemperature)
    if lengths.temperatures and dtemperature is not None:
        dtemperature = torch.stack([part.dtemperature for part in parts])  # type: ignore[misc]
    return dtemperature, dm


def _added(total: Tensor | None, gradient: Tensor | None, z: Tensor, d: int, weight: float) -> Tensor | None:
    """The gradients of several lengths are summed in float32 at least."""
    if gradient is None:
        return None
    if total is None:
        total = torch.zeros(z.shape, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    total[:, :d].add_(gradient, alpha=weight)
    return total


def _times(x: Tensor | None, factor: float) -> Tensor | None:
    return None if x is None else x * factor


def _sum(total: Tensor | None, x: Tensor | None) -> Tensor | None:
    if total is None or x is None:
        return x
    return total + x
