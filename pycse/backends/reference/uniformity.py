"""Alignment and uniformity as the formulas say: all pairs, any float dtype, differentiable to any order.

alignment  = mean_i |xhat_i - yhat_i|^2                                  (arXiv 2005.10242, section 4.1)
uniformity = log mean_{i < j} exp(-t |zhat_i - zhat_j|^2)                the diagonal is left out
"""

from __future__ import annotations

import math

import torch

from pycse.backends.reference.contrastive import normalized
from pycse.problem import Alignment, Result, Uniformity


def alignment(p: Alignment) -> Result:
    x, y = (normalized(p.x), normalized(p.y)) if p.normalize else (p.x, p.y)
    rows = (x - y).to(torch.promote_types(x.dtype, torch.float32)).square().sum(1)
    return Result(rows, loss=rows.mean())


def uniformity(p: Uniformity) -> Result:
    z = p.z if p.others is None else torch.cat((p.z, p.others))
    z = normalized(z) if p.normalize else z
    N, own = z.shape[0], p.z.shape[0]
    i, j = torch.triu_indices(N, N, 1, dtype=torch.int64, device=z.device)
    square = z.square().sum(1)
    distance = (square[i] + square[j] - 2 * (z @ z.t())[i, j]).to(p.acc)
    # Of a pair with another process' row half the value is this one's, and the whole gradient.
    shared = j >= own
    distance = torch.where(shared, 2 * distance - distance.detach(), distance)
    rows = -p.t * distance
    rows = torch.where(shared, rows - math.log(2), rows)[i < own]
    return Result(rows, loss=rows.logsumexp(0) - math.log(N * (N - 1) / 2))
