"""The formulas in plain PyTorch: what eager peers compute, and what everything that is timed is held against, in
float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import CLASSES, LISTED, Inputs, Workload, lengths

TAU, M = 0.05, 0.3
SCALE, BIAS = 10.0, -10.0  # of the sigmoid loss
STUDENT, TEACHER, P = 0.025, 0.0125, 0.1
CHUNK = 1024  # rows of the reference at a time


def positives(s: Tensor, first: int = 0) -> Tensor:
    return torch.arange(first, first + len(s), device=s.device)


def classes(rows: Tensor, first: int = 0) -> Tensor:
    """Of the rows of a supervised loss."""
    return positives(rows, first) % CLASSES


def contrastive(op: str, z1: Tensor, z2: Tensor, first: int = 0) -> Tensor:
    """Mean loss of rows whose positives are the keys from ``first`` on: what people write."""
    if op == "matryoshka":
        parts = [contrastive("infonce", z1[:, :d], z2[:, :d], first) for d in lengths(z1.shape[1])]
        return torch.stack(parts).sum()
    s = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).t()
    return contrastive_of_similarities(op, s, first)


def guided(z1: Tensor, z2: Tensor, guide: list[Tensor], first: int = 0) -> Tensor:
    """GISTEmbed: keys nearer to the row than its positive is, by the guide, are no negatives."""
    s = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).t()
    with torch.no_grad():
        t = F.normalize(guide[0][first : first + len(z1)], dim=1) @ F.normalize(guide[1], dim=1).t()
        near = t > t.diagonal(first)[:, None]
    return F.cross_entropy((s / TAU).masked_fill(near, -torch.inf), positives(s, first))


def directions(z1: Tensor, z2: Tensor, keys1: Tensor, first: int = 0) -> Tensor:
    """qd, qq, dq and dd in one sum. z1: queries from ``first`` on, of all ``keys1``; z2: all documents."""
    q, queries, d = (F.normalize(z, dim=1) for z in (z1, keys1, z2))
    rows = d[first : first + len(q)]
    s, alone = q @ d.t(), torch.full((len(q),), -torch.inf, device=q.device)
    others = [(x @ y.t()).diagonal_scatter(alone, first) for x, y in ((q, queries), (rows, d))]
    return F.cross_entropy(torch.cat([s, rows @ queries.t(), *others], 1) / TAU, positives(s, first))


def contrastive_of_similarities(op: str, s: Tensor, first: int = 0, reduction: str = "mean") -> Tensor:
    target = positives(s, first)
    if op == "lists":  # of B (1 + LISTED) keys the first B, and the row's own
        B = s.shape[1] // (1 + LISTED)
        own = torch.arange(s.shape[1], device=s.device) % B == target[:, None]
        own[:, :B] = True
        return F.cross_entropy((s / TAU).masked_fill(~own, -torch.inf), target, reduction=reduction)
    if op == "supcon":  # the row itself out
        positive = classes(s, first)[:, None] == classes(s.t())
        positive = positive.diagonal_scatter(torch.zeros_like(s.diagonal(first), dtype=torch.bool), first)
        alone = torch.full_like(s.diagonal(first), -torch.inf)
        log_p = (s / TAU).diagonal_scatter(alone, first).log_softmax(1)
        rows = -log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)
        return rows.mean() if reduction == "mean" else rows.sum()
    if op == "focal":
        positive = s.diagonal(first) ** 2 / TAU
        return F.cross_entropy((s * (s + M) / TAU).diagonal_scatter(positive, first), target, reduction=reduction)
    if op == "sigmoid":
        x = SCALE * s + BIAS
        rows = -F.logsigmoid((-x).diagonal_scatter(x.diagonal(first), first)).sum(1)
        return rows.mean() if reduction == "mean" else rows.sum()
    loss = F.cross_entropy(s / TAU, target, reduction=reduction)
    return (loss + F.cross_entropy(s.t() / TAU, target)) / 2 if op == "symmetric" else loss


def distillation_of_similarities(s: Tensor, t: Tensor, shuffle: str) -> Tensor:
    """Sum over rows; s and t have their diagonals. Vectorised: sort, cumsum, argsort of group + noise, gather,
    log_softmax."""
    B = len(s)
    with torch.no_grad():
        t, order = t.clone().fill_diagonal_(-torch.inf).sort(dim=1, descending=True)
        q = (t / TEACHER).softmax(1)
        if shuffle != "none":
            groups = math.ceil(1 / P)
            group = (t.softmax(1).cumsum(1) / P).floor_().clamp_(max=groups - 1)
            if shuffle == "sample":
                order = order.gather(1, (group + torch.rand_like(t)).argsort(1))
            else:
                group = group.long()
                member = torch.ones_like(q)
                member[:, -1] = 0  # the removed diagonal sorts last
                total, count = (torch.zeros(B, groups, device=t.device).scatter_add_(1, group, m) for m in (q, member))
                q = (total / count.clamp(min=1)).gather(1, group) * member
    log_p = (s / STUDENT).diagonal_scatter(s.new_full((min(s.shape),), -1e4)).log_softmax(1)
    return -(q * log_p.gather(1, order)).sum()


def distillcse(z1: Tensor, z2: Tensor, teachers: list[Tensor], shuffle: str) -> Tensor:
    a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    with torch.no_grad():
        units = [F.normalize(e, dim=1) for e in teachers]
        t = sum(e @ e.t() for e in units) / len(units)
    return contrastive_of_similarities("infonce", a @ b.t()) + distillation_of_similarities(
        a @ a.t(), t, shuffle
    ) / len(a)


def uniformity(z: Tensor) -> Tensor:
    """On the Gram matrix, exp(4 (s - 1)) with the diagonal out: ten times faster than torch.pdist."""
    z = F.normalize(z, dim=1)
    e = (4 * (z @ z.t() - 1)).exp()
    return (e.sum() - e.diagonal().sum()).log() - math.log(len(z) * (len(z) - 1))


def formula(w: Workload, x: Inputs, shuffle: str = "") -> Callable[..., Tensor]:
    """The workload's output as a function of its leaves."""
    shuffle = shuffle or w.shuffle
    if w.op == "distillcse":
        return lambda z1, z2: distillcse(z1, z2, x.teachers, shuffle)
    if w.op == "uniformity":
        return uniformity
    if w.op == "supcon":
        return lambda z: contrastive("supcon", z, z)
    if w.op == "guided":
        return lambda z1, z2: guided(z1, z2, x.teachers)
    if w.op == "directions":
        return lambda z1, z2: directions(z1, z2, z1)
    if w.op == "sparse":
        return F.linear
    if w.op == "contrastive-rows":
        return lambda S: contrastive_of_similarities("focal", S, reduction="sum")
    if w.op == "distill-rows":
        return lambda S: distillation_of_similarities(S, x.teachers[0], shuffle)
    return lambda z1, z2: contrastive(w.op, z1, z2)


def reference(w: Workload, x: Inputs) -> list[Tensor]:
    """Output and gradients by the formula in float32; contrastive losses in chunks of rows, the symmetric one direction
    by direction.

    What draws at random is compared without its draw. Of huge inputs only the gradient of the first rows is compared.
    """
    leaves = [leaf.detach().float().requires_grad_(w.backward) for leaf in x.leaves]
    if (w.by_rows or w.op == "symmetric") and w.N > CHUNK:
        total = torch.zeros((), device=leaves[0].device)
        ways = [leaves, leaves[::-1]] if w.op == "symmetric" else [leaves if len(leaves) == 2 else leaves * 2]
        one_way = "infonce" if w.op == "symmetric" else w.op
        for (queries, keys), i in product(ways, range(0, CHUNK if in_part(w) else w.N, CHUNK)):
            rows = queries[i : i + CHUNK]
            if w.op == "guided":
                loss = guided(rows, keys, x.teachers, i)
            elif w.op == "directions":
                loss = directions(rows, keys, queries, i)
            else:
                loss = contrastive(one_way, rows, keys, i)
            loss = loss * (len(rows) / (w.N * len(ways)))
            if w.backward:
                loss.backward()
            total += loss.detach()
        if in_part(w):
            return [leaf.grad[:CHUNK] for leaf in leaves[:1] if leaf.grad is not None]
    else:
        total = formula(w, replace(x, teachers=[e.float() for e in x.teachers]), undrawn(w))(*leaves)
        if w.backward:
            total.backward(None if x.upstream is None else x.upstream.float())
    return [total.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def in_part(w: Workload) -> bool:
    """Only the gradient of the first rows is compared."""
    return w.huge and w.by_rows and w.backward


def undrawn(w: Workload) -> str:
    """Its shuffle, or none where that draws."""
    return "none" if w.shuffle == "sample" else w.shuffle
