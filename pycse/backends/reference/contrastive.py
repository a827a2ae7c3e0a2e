"""InfoNCE and Focal-InfoNCE as the formulas say: materialises N x N, any float dtype, differentiable to any order.

    s_ij = z1hat_i . z2hat_j
    l_ij = the form's quadratic of s_ij: pycse/logits.py
    L_i  = logsumexp_j l_ij - l_i,pos

This is the oracle that every kernel is tested against.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycse.logits import NONE, Term
from pycse.problem import Contrastive, Result


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
    z1, z2 = (normalized(p.z1), normalized(p.z2)) if p.normalize else (p.z1, p.z2)
    s = (z1 @ z2.t()).to(p.acc)
    B, N = s.shape
    i, j = (torch.arange(n, dtype=torch.int64, device=s.device) for n in (B, N))
    pos = i if p.positives is None else p.positives

    positive = j == pos[:, None]
    s_pos = s.gather(1, pos[:, None])
    own_hard = (j >= B) & (j % B == i[:, None]) & ~positive
    own_b, own_c = p.logit.own

    def coefficient(term: Term) -> Tensor | float:
        return (term.over + term.m_over * p.m) / p.temperature

    def quadratic(q: Term, b: Term) -> Tensor:
        """(q s + b) s without the terms that are not there: 0 times an infinite s would be NaN."""
        if q == NONE:
            return coefficient(b) * s
        return coefficient(q) * s * s if b == NONE else (coefficient(q) * s + coefficient(b)) * s

    q, b, c = p.logit.positive
    l_positive = quadratic(q, b) + coefficient(c)
    q, b = p.logit.negative
    l = quadratic(q, b)
    if b.fixed:
        l = l + b.fixed * s.detach()
    if p.logit.has_own:
        l = l + torch.where(own_hard, own_b * s.detach() + own_c, 0)
    l = torch.where(positive, l_positive, l)
    l_pos = l.gather(1, pos[:, None])

    same_id = torch.zeros_like(positive)
    if p.query_ids is not None and p.key_ids is not None:
        same_id = p.query_ids[:, None] == p.key_ids

    if p.guided:
        t = p.guide_logits
        if t is None:
            assert p.guide_queries is not None and p.guide_keys is not None
            t = p.guide_queries @ p.guide_keys.t()
        t = t.detach().to(s.dtype)
        t_pos = t.gather(1, pos[:, None])
        bound = {"absolute": t_pos, "relative": t_pos, "constant": t_pos * 0}[p.guide_by]
        same_id = same_id | (t > bound + p.guide_above * (t_pos.abs() if p.guide_by == "relative" else 1))

    def losses(s_pos: Tensor, dim: int) -> Tensor:
        dropped = same_id
        if p.excludes:
            above: Any = (
                p.exclude_above if p.exclude_each is None else p.exclude_each.detach().to(s.dtype).unsqueeze(dim)
            )
            at = s_pos.detach()
            bound = {"absolute": at + above, "relative": at + above * at.abs(), "constant": at * 0 + above}
            dropped = dropped | (s.detach() > bound[p.exclude_by])
        kept = l.masked_fill(dropped & ~positive, -torch.inf)
        # softplus(log sum_neg - l_pos): logsumexp(l) - l_pos without its cancellation.
        negatives = kept.masked_fill(positive, -torch.inf)
        alone = torch.isneginf(negatives).all(dim)
        negatives = negatives.masked_fill(alone.unsqueeze(dim) & positive, 0)  # keeps gradients of empty rows finite
        return torch.where(alone, 0, torch.logaddexp(l.new_zeros(()), negatives.logsumexp(dim) - l_pos.squeeze(1)))

    rows = losses(s_pos, 1)
    if p.symmetric:
        rows = (rows + losses(s_pos.t(), 0)) / 2
    return Result(rows)
