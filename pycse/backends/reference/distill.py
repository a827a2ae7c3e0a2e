"""DistillCSE's distillation as the formulas say: materialises B x B, any float dtype, differentiable to any order.

s_ij = zhat_i . zhat_j               p_i = softmax over j != i of s_ij / student_temperature
t_ij = sum_k w_k ehat^k_i . ehat^k_j   q_i = softmax over j != i of t_ij / teacher_temperature
q shuffled inside its groups (pycse/grouping.py), or averaged over them ("expected")
ce  L_i = -sum_j q log p      kl  L_i = sum_j q log(q / p)      js  L_i = (KL(q | a) + KL(p | a)) / 2,  a = (p + q) / 2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycse import grouping, transforms
from pycse.backends.reference.contrastive import normalized
from pycse.problem import Distillation, Result


def teacher_similarities(d: Distillation) -> Tensor:
    if d.logits is not None:
        return d.logits.detach().to(d.acc)
    t = torch.zeros((d.z1.shape[0],) * 2, dtype=d.acc, device=d.z1.device)
    for e, w in zip(d.teachers, d.teacher_weights):
        unit = normalized(e.detach())
        t += w * (unit @ unit.t()).to(d.acc)
    return t


def averaged(q: Tensor, group: Tensor) -> Tensor:
    """Each entry replaced by the mean of its group; group -1 stays."""
    slot = grouping_slots(group)
    total = torch.zeros_like(q).scatter_add_(1, slot, q)
    count = torch.zeros_like(q).scatter_add_(1, slot, torch.ones_like(q))
    return torch.where(group < 0, q, (total / count.clamp_min(1)).gather(1, slot))


def grouping_slots(group: Tensor) -> Tensor:
    """Groups renumbered to fit a row: the first column's position among equals."""
    ordered, by = group.sort(dim=1, stable=True)
    return torch.empty_like(by).scatter_(1, by, torch.searchsorted(ordered, ordered.contiguous()))


def losses(d: Distillation, source: Tensor | None = None) -> Tensor:
    """(B,) losses by autograd all the way. ``source`` (B, B) replays given permutations: column j receives
    q[source_ij]."""
    B = d.z1.shape[0]
    z = normalized(d.z1) if d.normalize else d.z1
    if B == 1:
        return (z * 0).sum(1).to(d.acc)
    s, t = (z @ z.t()).to(d.acc), teacher_similarities(d)
    others = torch.arange(B - 1, dtype=torch.int64, device=s.device).expand(B, -1)
    others = others + (
        others >= torch.arange(B, dtype=torch.int64, device=s.device)[:, None]
    )  # (B, B - 1) columns but the diagonal

    log_p = (s.gather(1, others) / d.student_temperature).log_softmax(1)
    log_q = (t.gather(1, others) / d.teacher_temperature).log_softmax(1)
    q = log_q.exp()
    entropy = -torch.where(q == 0, 0, q * log_q).sum(1)
    if d.cut is not None or source is not None:
        q = torch.zeros_like(s).scatter(1, others, q)
        if source is None:
            assert d.cut is not None
            group = grouping.groups(t, 0, d.cut, d.group_temperature)
            q = averaged(q, group) if d.shuffle == "expected" else q.gather(1, grouping.shuffled(group, 0, d.seed))
        else:
            q = q.gather(1, source)
        q = q.gather(1, others)
    if d.divergence == "js":
        p = log_p.exp()
        log_a = (p + q).clamp_min(torch.finfo(p.dtype).tiny).log() - math.log(2)  # halves of the smallest numbers are 0
        return (torch.xlogy(q, q) - q * log_a + torch.where(p == 0, 0, p * (log_p - log_a))).sum(1) / 2
    cross = -torch.where(q == 0, 0, q * log_p).sum(1)
    return cross - entropy if d.divergence == "kl" else cross


def distill(d: Distillation) -> Result:
    if any(map(transforms.batched, (d.z1, d.logits, *d.teachers))):
        raise RuntimeError(
            "backend='reference' of a distillation sorts rows, which vmap cannot batch: use another backend"
        )
    return Result(losses(d)[d.mine])
