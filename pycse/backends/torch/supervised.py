"""The row kernel of the supervised contrastive loss in plain PyTorch, formulas as in kernels/cpu/supervised.h: any
device, no compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.backends.torch.norms import Norms
from pycse.panels import contrastive as panel
from pycse.problem import Result, Supervised


class Kernels(Norms, panel.Kernels):
    temporaries = 4  # c x N copies alive at once, masks beside them: the driver takes fewer rows
    p: Supervised

    def __init__(self, p: Supervised, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        self.b = p.sharpness()

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        p, out = self.p, self.state
        part = slice(i0, i0 + S.shape[0])
        positive = p.ids1[part, None] == p.key_ids
        s = S.to(p.acc) * out.r2
        others = ~positive  # the negatives
        if p.same:
            k = torch.arange(S.shape[0], dtype=torch.int64, device=S.device)
            positive[k, k + i0] = False
        n = positive.sum(1, keepdim=True)
        some = n > 0
        n = n.clamp_(min=1).to(p.acc)

        l = s * self.b
        l_pos = l.masked_fill(~positive, -torch.inf)
        l.masked_fill_(~others, -torch.inf)
        # A row without positives: any finite shift, for it counts for nothing.
        top_pos = torch.where(some, l_pos.amax(1, keepdim=True), 0)
        top = torch.maximum(l.amax(1, keepdim=True), top_pos)
        scale = (top_pos - top).exp()
        mean = l_pos.masked_fill(~positive, 0).sum(1, keepdim=True) / n
        e, e_pos = l.sub_(top).exp_(), l_pos.sub_(top_pos).exp_()
        z_neg, w = e.sum(1, keepdim=True), e_pos.sum(1, keepdim=True)
        z_pos = w * scale
        ratio = z_neg / z_pos
        apart = z_neg.log() - w.log() + (top - top_pos)  # log ratio, which may overflow
        loss = n.log() + torch.where(ratio > 1, apart + (z_pos / z_neg).log1p(), ratio.log1p())
        if not p.inside:
            loss = loss + torch.where(n > 1, (w / n).log() + (top_pos - mean), 0)
        out.loss[part] = torch.where(some, loss, 0).squeeze(1)
        if not grad:
            return
        coef = out.coef if isinstance(out.coef, float) else out.coef[part, None]
        f = torch.where(some, coef / (z_neg + z_pos), 0)
        if p.inside:
            P_pos = e_pos.mul_(-z_neg / w)
        else:
            P_pos = e_pos.mul_(n).sub_(w).mul_(scale).sub_(z_neg).div_(n)
        P = e.add_(P_pos.masked_fill_(~positive, 0)).mul_(f)
        P.masked_fill_(~some, 0)
        if out.dlogit is not None:
            out.dlogit[0, part] = (P * s).sum(1)
        S.copy_(P.mul_(self.b).mul_(out.r2))


def supervised(p: Supervised) -> Result:
    return panel.contrastive(p, Kernels)
