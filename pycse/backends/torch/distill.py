"""The distillation's row kernel in plain PyTorch: any device, no compiler. Formulas as in kernels/cpu/distill.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycse import grouping
from pycse.backends.torch.norms import Norms
from pycse.panels import distill as panel
from pycse.problem import Distillation, Result


def averaged(q: Tensor, group: Tensor) -> Tensor:
    """Each entry replaced by the mean of its group; group -1 stays."""
    ordered, order = group.sort(dim=1, stable=True)
    # A group's number: where it begins in the order of groups.
    first = torch.searchsorted(ordered, ordered.contiguous())
    number = torch.empty_like(order).scatter_(1, order, first)
    means = torch.zeros_like(q).scatter_reduce_(1, number, q, "mean", include_self=False)
    return torch.where(group < 0, q, means.gather(1, number))


class Kernels(Norms, panel.Kernels):
    temporaries = 12  # int64 keys among them

    def __init__(self, d: Distillation, state: panel.State) -> None:
        super().__init__(d.z1)
        self.d, self.state = d, state

    def rows(self, S: Tensor, T: Tensor, i0: int, grad: bool) -> None:
        d, out = self.d, self.state
        c = S.shape[0]
        diagonal = torch.arange(i0, i0 + c, dtype=torch.int64, device=S.device)[:, None]
        t = T.to(d.acc)
        log_q = (t / d.teacher_temperature).scatter_(1, diagonal, -torch.inf).log_softmax(1)
        q = log_q.exp()
        x = (S.to(d.acc) / d.student_temperature).scatter_(1, diagonal, -torch.inf)
        x -= x.amax(1, keepdim=True)
        entropy = -(q * log_q).scatter_(1, diagonal, 0).masked_fill_(q == 0, 0).sum(1)
        if d.cut is not None:
            group = grouping.groups(t, i0, d.cut, d.group_temperature)
            q = averaged(q, group) if d.shuffle == "expected" else q.gather(1, grouping.shuffled(group, i0, d.seed))
        z = x.exp().sum(1, keepdim=True)
        log_p = x - z.log()
        p = log_p.exp()
        coef = (out.coef if isinstance(out.coef, float) else out.coef[i0 : i0 + c, None]) / d.student_temperature
        part = out.loss[i0 : i0 + c]
        if d.divergence == "js":
            # Not of (p + q) / 2: half of the smallest number is 0.
            log_a = (p + q).clamp_min(torch.finfo(p.dtype).tiny).log() - math.log(2)
            p_part = (p * (log_p - log_a)).masked_fill_(p == 0, 0)
            kl_p = p_part.sum(1, keepdim=True)
            q_part = torch.xlogy(q, q) - torch.where(q == 0, 0, q * log_a)
            part.copy_((q_part.sum(1) + kl_p.squeeze(1)) / 2)
            G = coef / 2 * (p_part - p * kl_p)
        else:
            cross = -torch.where(q == 0, 0, q * log_p).sum(1)
            part.copy_(cross - entropy if d.divergence == "kl" else cross)
            G = coef * (p - q)
        if grad:
            S.copy_(G.scatter_(1, diagonal, 0))


def distill(d: Distillation) -> Result:
    return panel.distill(d, Kernels)
