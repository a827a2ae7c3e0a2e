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
    z = normalized(p.z) if p.normalize else p.z
    N = z.shape[0]
    i, j = torch.triu_indices(N, N, 1, dtype=torch.int64, device=z.device)
    square = z.square().sum(1)
    distance = (square[i] + square[j] - 2 * (z @ z.t())[i, j]).to(p.acc)
    rows = -p.t * distance
    return Result(rows, loss=rows.logsumexp(0) - math.log(N * (N - 1) / 2))
