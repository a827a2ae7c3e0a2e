"""AdapACSE's row kernel in plain PyTorch: any device, no compiler. Formulas as in kernels/cpu/adapacse.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycse.backends.torch.norms import Norms
from pycse.panels import contrastive as panel
from pycse.problem import LEAST_SINE, Angular, Result


class Kernels(Norms, panel.Kernels):
    temporaries = 7  # c x N copies alive at once: the driver takes fewer rows
    p: Angular

    def __init__(self, p: Angular, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        self.b = p.sharpness()

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        p, out = self.p, self.state
        part = slice(i0, i0 + S.shape[0])
        i = torch.arange(i0, i0 + S.shape[0], dtype=torch.int64, device=S.device)
        pos = i if p.positives is None else p.positives[part]
        valid = (pos >= 0) & (pos < S.shape[1])
        pos = pos.clamp(0, S.shape[1] - 1)[:, None]
        s = S.to(p.acc) * out.r2
        s_pos = s.gather(1, pos) if out.s_pos is None else out.s_pos[part, None]
        s_pos = torch.where(valid[:, None], s_pos, torch.nan)  # an index that is no key: a NaN row
        none = torch.zeros(s.shape, dtype=torch.bool, device=s.device).scatter_(1, pos, True)
        if p.query_ids is not None and p.key_ids is not None:
            none |= p.query_ids[part, None] == p.key_ids

        assert out.T is not None
        u = out.T.to(p.acc).clamp(-1, 1).sub_(1).mul_(-p.m / 2).masked_fill_(none, 0)
        sin, cos = u.sin(), u.cos_()
        sine = ((1 - s) * (1 + s)).clamp_(min=0).sqrt_()
        twice = (2 * sin).masked_fill_(s >= math.cos(p.m), 0)
        c = (sine * cos).sub_(s * sin).mul_(twice).add_(s)

        l_pos = s_pos * self.b
        e = (c * self.b).masked_fill_(none, -torch.inf)
        shift = torch.maximum(e.amax(1, keepdim=True), l_pos)
        e.sub_(shift).exp_()
        z_neg = e.sum(1, keepdim=True)
        d = z_neg.log() + shift - l_pos
        out.loss[part] = torch.logaddexp(torch.zeros_like(d), d).squeeze(1)
        if not grad:
            return
        coef = out.coef if isinstance(out.coef, float) else out.coef[part, None]
        unit = coef / (z_neg + (l_pos - shift).exp())
        e.mul_(unit)  # coef p_ij over the negatives
        P_pos = -unit * z_neg
        if out.dlogit is not None:
            out.dlogit[0, part] = (e * c).sum(1) + (P_pos * s_pos).squeeze(1)
        slope = s.mul_(cos).div_(sine.clamp_(min=LEAST_SINE)).add_(sin).mul_(twice).neg_().add_(1)
        G = e.mul_(slope).mul_(self.b).mul_(out.r2)
        G.scatter_(1, pos, P_pos * self.b * out.r2[pos])
        S.copy_(G)


def adapacse(p: Angular) -> Result:
    return panel.contrastive(p, Kernels)
