"""The sigmoid loss as the formula says: materialises N x N, any float dtype, differentiable to any order.

x_ij = scale z1hat_i . z2hat_j + bias
L_i  = sum_j -log sigmoid(y_ij x_ij),   y_ij = 1 for a positive, else -1       (arXiv 2303.15343, algorithm 1)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pycse.backends.reference.contrastive import normalized
from pycse.problem import Result, Sigmoid


def sigmoid(p: Sigmoid) -> Result:
    """The rows' losses, by autograd all the way."""
    z1, z2 = (normalized(p.z1), normalized(p.z2)) if p.normalize else (p.z1, p.z2)
    s = (z1 @ z2.t()).to(p.acc)
    x = p.scale * s + p.bias
    held = slice(p.first, p.first + p.z1.shape[0])
    if p.query_ids is not None and p.key_ids is not None:
        positive = p.query_ids[held, None] == p.key_ids
    else:
        i, j = (torch.arange(n, dtype=torch.int64, device=s.device) for n in s.shape)
        positive = j == (i + p.first if p.positives is None else p.positives[held])[:, None]
    return Result(-F.logsigmoid(torch.where(positive, x, -x)).sum(1))
