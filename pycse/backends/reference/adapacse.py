"""AdapACSE as the formula says: materialises B x N, any float dtype, differentiable to any order.

    s_ij = cos(theta_ij) = z1hat_i . z2hat_j,    phi_ij = m (1 - alpha_ij),    alpha the teachers' cosine in [-1, 1]
    l_ip = s_ip / temperature                                     the positive
    l_ij = cos(theta_ij - phi_ij) / temperature                   negatives with theta_ij > m, others s_ij / temperature
         = (s_ij cos(phi_ij) + sin(theta_ij) sin(phi_ij)) / temperature
    L_i  = logsumexp_j l_ij - l_ip                                (arXiv 2403.17486)

The slope of sin(theta) = sqrt(1 - s^2) over s, -s / sin(theta), has no bound at s = -1: where sin(theta) < 2^-10 it is
-s 2^10, and the value is as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycse.backends.reference.contrastive import normalized
from pycse.problem import LEAST_SINE, Angular, Result


def sine(s: Tensor) -> Tensor:
    """sqrt(1 - s^2), 0 where a rounding has made |s| larger than 1."""
    square = (1 - s) * (1 + s)
    least = square < LEAST_SINE**2
    bounded = square.detach().clamp(min=0).sqrt() + (square - square.detach()) / (2 * LEAST_SINE)
    return torch.where(least, bounded, torch.where(least, 1, square).sqrt())


def adapacse(p: Angular) -> Result:
    """The rows' losses, by autograd all the way."""
    s = (normalized(p.z1) @ normalized(p.z2).t()).to(p.acc)
    i, j = (torch.arange(n, dtype=torch.int64, device=s.device) for n in s.shape)
    held = slice(p.first, p.first + p.z1.shape[0])
    pos = i + p.first if p.positives is None else p.positives[held]
    negative = j != pos[:, None]
    if p.query_ids is not None and p.key_ids is not None:
        negative = negative & (p.query_ids[held, None] != p.key_ids)

    alpha = p.guide_logits
    if alpha is None:
        assert p.guide_queries is not None and p.guide_keys is not None
        alpha = p.guide_queries @ p.guide_keys.t()
    alpha = alpha.detach().to(s.dtype).clamp(-1, 1).masked_fill(~negative, 1)
    phi = p.m * (1 - alpha)
    turned = s * phi.cos() + sine(s) * phi.sin()
    l = torch.where(s < math.cos(p.m), turned, s + 0 * phi) / p.temperature  # a NaN of the teacher's stays one

    # softplus(log sum_neg - l_pos): logsumexp(l) - l_pos without its cancellation.
    l_pos = s.gather(1, pos[:, None]).squeeze(1) / p.temperature
    alone = ~negative.any(1)
    l_neg = l.masked_fill(~negative, -torch.inf).masked_fill(alone[:, None], 0).logsumexp(1)
    return Result(torch.where(alone, 0, torch.logaddexp(torch.zeros_like(l_pos), l_neg - l_pos)))
