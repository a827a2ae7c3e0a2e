"""InfoNCE and Focal-InfoNCE as the formulas say: materialises N x N, any float dtype, differentiable to any order.

    s_ij = z1hat_i . z2hat_j
    l_ij = the form's quadratic of s_ij: pycse/logits.py
    L_i  = logsumexp_j l_ij - l_i,pos

This is the oracle that every kernel is tested against.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pycse.logits import NONE, Term
from pycse.problem import Contrastive, Result, Rows


def normalized(z: Tensor) -> Tensor:
    """z / |z|; rows with |z| <= 1e-12 become 0 with gradient 0."""
    # Scaled by its largest entry first, so that |z| itself cannot overflow or underflow.
    scale = z.detach().abs().amax(dim=1, keepdim=True)
    unit = z / torch.where(scale > 0, scale, 1)
    length = unit.norm(dim=1, keepdim=True)
    tiny = (length.detach() * scale) <= 1e-12
    return torch.where(tiny, 0, unit / torch.where(tiny, 1, length))


def contrastive(p: Contrastive) -> Result:
    """The rows' losses, by autograd all the way."""
    if not p.symmetric and "q" not in (name[1] for name in p.directions.split()):  # rows are no keys: its own do
        p = replace(p, z1=p.z1[p.mine.start - p.first : p.mine.stop - p.first])
    return Result(own_of(p, losses_of(p)))


def own_of(p: Rows, losses: Tensor) -> Tensor:
    """This process' losses of those of z1's rows."""
    return losses[p.mine.start - p.first : p.mine.stop - p.first]


def losses_of(p: Contrastive) -> Tensor:
    """The losses of z1's rows."""
    z1, z2 = (normalized(p.z1), normalized(p.z2)) if p.normalize else (p.z1, p.z2)
    s = (z1 @ z2.t()).to(p.acc)
    (rows, N), B = s.shape, p.B
    i, j = (torch.arange(n, dtype=torch.int64, device=s.device) for n in (rows, N))
    i = i + p.first
    held = slice(p.first, p.first + rows)  # of all rows
    pos = i if p.positives is None else p.positives[held]
    query_ids = None if p.query_ids is None else p.query_ids[held]

    positive = j == pos[:, None]
    s_pos = s.gather(1, pos[:, None])
    own = (j >= B) & (j % B == i[:, None])  # its hard negatives
    not_shared = torch.zeros_like(positive)
    if p.negatives_ptr is not None and p.negatives_index is not None:
        row = torch.repeat_interleave(i - p.first, p.negatives_ptr.diff()[held].to(s.device))
        own = torch.zeros_like(positive)
        own[row, p.negatives_index.to(s.device)] = True
        not_shared = own.any(0) & ~own
    own_b, own_c = p.logit.own

    temperature, m = (x.to(p.acc) if isinstance(x, Tensor) else x for x in (p.temperature, p.m))

    def coefficient(term: Term) -> Tensor | float:
        return (term.over + term.m_over * m) / temperature

    def quadratic(q: Term, b: Term, s: Tensor) -> Tensor:
        """(q s + b) s without the terms that are not there: 0 times an infinite s would be NaN."""
        if q == NONE:
            return coefficient(b) * s
        return coefficient(q) * s * s if b == NONE else (coefficient(q) * s + coefficient(b)) * s

    def negative_logits(s: Tensor, hardness: bool = True) -> Tensor:
        q, b = p.logit.negative
        l = quadratic(q, b, s)
        return l + b.fixed * s.detach() if b.fixed and hardness else l

    q, b, c = p.logit.positive
    l_pos = quadratic(q, b, s_pos) + coefficient(c)
    l = negative_logits(s)
    if p.logit.has_own:
        l = l + torch.where(own & ~positive, own_b * s.detach() + own_c, 0)

    same_id = not_shared
    if query_ids is not None and p.key_ids is not None:
        same_id = same_id | (query_ids[:, None] == p.key_ids)

    if p.guided:
        t = p.guide_logits
        if t is None:
            assert p.guide_queries is not None and p.guide_keys is not None
            t = p.guide_queries @ p.guide_keys.t()
        t = t.detach().to(s.dtype)
        t_pos = t.gather(1, pos[:, None])
        at = {"absolute": t_pos, "relative": t_pos, "constant": t_pos * 0}[p.guide_by]
        same_id = same_id | (t > at + p.guide_above * (t_pos.abs() if p.guide_by == "relative" else 1))

    def too_near(s: Tensor, s_pos: Tensor, dim: int) -> Tensor:
        if not p.excludes:
            return torch.zeros_like(s, dtype=torch.bool)
        above: Any = p.exclude_above
        if p.exclude_each is not None:
            above = p.exclude_each[held].detach().to(s.dtype).unsqueeze(dim)
        at = s_pos.detach()
        bound = {"absolute": at + above, "relative": at + above * at.abs(), "constant": at * 0 + above}
        return s.detach() > bound[p.exclude_by]

    def log_sum(negatives: Tensor, dim: int) -> Tensor:
        """-inf, without a gradient, where there are none."""
        alone = torch.isneginf(negatives).all(dim)
        filled = negatives.masked_fill(alone.unsqueeze(dim), 0)
        return torch.where(alone, -torch.inf, filled.logsumexp(dim))

    def losses(negatives: Tensor, dim: int, times: int = 1) -> Tensor:
        """softplus(log sum_neg - l_pos): logsumexp(l) - l_pos without its cancellation, times
        the positive."""
        total = log_sum(negatives, dim)
        alone = torch.isneginf(total)
        d = torch.where(alone, 0, total) - l_pos.squeeze(1) - math.log(times)
        return torch.where(alone, 0, torch.logaddexp(l.new_zeros(()), d)) + math.log(times)

    dropped = positive | same_id
    negatives = l.masked_fill(dropped | too_near(s, s_pos, 1), -torch.inf)
    if p.output == "negatives":
        return log_sum(negatives, 1)
    if p.output == "logsum":
        total = log_sum(negatives, 1)
        return torch.where(torch.isneginf(total), l_pos.squeeze(1), torch.logaddexp(total, l_pos.squeeze(1)))
    if p.symmetric:
        columns = l.masked_fill(dropped | too_near(s, s_pos.t(), 0), -torch.inf)
        return (losses(negatives, 1) + losses(columns, 0)) / 2
    if p.directions == "qd":
        return losses(negatives, 1)

    parts = {"qd": negatives}
    embeddings, ids = {"q": z1, "d": z2}, {"q": p.query_ids, "d": p.key_ids}
    for direction in p.directions.split()[1:]:
        of, keys = (embeddings[side] for side in direction)
        s = ((of if of is z1 else of[held]) @ keys.t()).to(p.acc)
        gone = (
            torch.arange(s.shape[1], dtype=torch.int64, device=s.device) % B == i[:, None]
        )  # itself, its positive, its hard negatives
        if (key_ids := ids[direction[1]]) is not None and query_ids is not None:
            gone = gone | (query_ids[:, None] == key_ids)
        parts[direction] = negative_logits(s, hardness=False).masked_fill(gone | too_near(s, s_pos, 1), -torch.inf)
    if p.partition == "joint":
        return losses(torch.cat(list(parts.values()), 1), 1, 2 if "dq" in parts else 1)
    return torch.stack([losses(part, 1) for part in parts.values()]).mean(0)
