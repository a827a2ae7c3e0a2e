"""The supervised contrastive loss as the formulas say: materialises B x N, any float dtype, differentiable to any
order.

    s_ij = z1hat_i . z2hat_j,   l = s / temperature,   P(i) = {j: ids2_j = ids1_i},   n = |P(i)|
    L_i  = softplus(l_neg - l_pos) + 1/n sum_p (l_pos - l_ip)          outside: 1/n sum_p (log sum_j exp(l_ij) - l_ip)
    L_i  = softplus(l_neg - l_pos) + log n                             inside: log n + log sum_j exp(l_ij) - l_pos

l_pos and l_neg are the logsumexp of the row's positives and of its other keys, of which the row itself is none where
rows are keys. Written so, no term is negative, and nothing cancels. A row without positives has loss 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.backends.reference.contrastive import normalized, own_of
from pycse.problem import Result, Supervised


def supervised(p: Supervised) -> Result:
    """The rows' losses, by autograd all the way."""
    assert p.z2 is not None
    z1, z2 = (normalized(p.z1), normalized(p.z2)) if p.normalize else (p.z1, p.z2)
    l = (z1 @ z2.t()).to(p.acc) / p.temperature
    positive = p.ids1[p.first : p.first + l.shape[0], None] == p.key_ids
    negative = ~positive
    if p.same:
        positive = positive & ~torch.eye(l.shape[0], dtype=torch.bool, device=l.device)
    n = positive.sum(1)
    none, alone = n == 0, ~negative.any(1)
    n = n.clamp(min=1).to(l.dtype)

    def log_sum(chosen: Tensor, empty: Tensor) -> Tensor:
        """Of rows that choose no key something finite, so that their gradients are."""
        return l.masked_fill(~chosen, -torch.inf).masked_fill(empty[:, None], 0).logsumexp(1)

    l_pos = log_sum(positive, none)
    rows = torch.logaddexp(torch.zeros_like(l_pos), log_sum(negative, alone) - l_pos).masked_fill(alone, 0)
    if p.inside:
        rows = rows + n.log()
    else:
        rows = rows + (l_pos[:, None] - l).masked_fill(~positive, 0).sum(1) / n
    return Result(own_of(p, rows.masked_fill(none, 0)))
