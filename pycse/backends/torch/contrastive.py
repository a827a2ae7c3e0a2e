"""The row kernels of the panel driver in plain PyTorch: any device, no compiler.

Formulas as in kernels/cpu/rows.h and symmetric.h; the panel is promoted to the accumulation type, so a visit takes a
few temporaries of the panel's size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycse.backends.torch.norms import Norms
from pycse.panels import contrastive as panel
from pycse.problem import Contrastive, Result


class Kernels(Norms, panel.Kernels):
    temporaries = 4  # c x N copies alive at once: the driver takes fewer rows

    def __init__(self, p: Contrastive, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        # A temperature tensor is not read back: <= 0 gives NaN.
        tau = p.temperature
        self.tau = torch.where(tau > 0, tau, torch.nan).to(p.acc) if isinstance(tau, Tensor) else tau

    def logit(self, s: Tensor) -> Tensor:
        return s * (s + self.p.m) / self.tau if self.p.focal else s / self.tau

    def slope(self, s: Tensor) -> Tensor | float:
        return (2 * s + self.p.m) / self.tau if self.p.focal else 1 / self.tau

    def positive_logit(self, s: Tensor) -> Tensor:
        return s * s / self.tau if self.p.focal else s / self.tau

    def positive_slope(self, s: Tensor) -> Tensor | float:
        return 2 * s / self.tau if self.p.focal else 1 / self.tau

    def _panel(self, S: Tensor, i0: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """s, the rows' positives (n, 1), their s, and which positives are in range (a bad one gives a NaN row)."""
        p = self.p
        i = torch.arange(i0, i0 + S.shape[0], dtype=torch.int64, device=S.device)
        pos = i if p.positives is None else p.positives[i0 : i0 + S.shape[0]]
        valid = (pos >= 0) & (pos < S.shape[1])
        pos = pos.clamp(0, S.shape[1] - 1)[:, None]
        s = S.to(p.acc) * self.state.r2
        s_pos = s.gather(1, pos) if self.state.s_pos is None else self.state.s_pos[i, None]
        s_pos = torch.where(valid[:, None], s_pos, torch.nan)
        return s, pos, s_pos, i

    def _negatives(self, s: Tensor, pos: Tensor, s_pos: Tensor | None, i: Tensor) -> Tensor:
        """Logits with -inf where a key is no negative of its row (or, with a row vector s_pos, of its column)."""
        p = self.p
        l = self.logit(s)
        if p.hard_negative_weight:
            B = p.z1.shape[0]
            own = torch.arange(1, s.shape[1] // B, dtype=torch.int64, device=s.device) * B + i[:, None]
            l.scatter_add_(1, own, torch.full_like(own, p.hard_negative_weight, dtype=l.dtype))
        if p.query_ids is not None and p.key_ids is not None:
            l.masked_fill_(p.query_ids[i, None] == p.key_ids, -torch.inf)
        if p.exclude_above is not None and s_pos is not None:
            l.masked_fill_(s > s_pos + p.exclude_above, -torch.inf)
        return l.scatter_(1, pos, -torch.inf)

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        p, out = self.p, self.state
        part = slice(i0, i0 + S.shape[0])
        s, pos, s_pos, i = self._panel(S, i0)
        l = self._negatives(s, pos, s_pos, i)
        l_pos = self.positive_logit(s_pos)
        shift = torch.maximum(l.amax(1, keepdim=True), l_pos)
        need_l = l.clone() if out.dtau is not None and grad else None
        e = l.sub_(shift).exp_()
        z_neg = e.sum(1, keepdim=True)
        l_neg = z_neg.log() + shift
        d = l_neg - l_pos
        out.loss[part] = torch.logaddexp(torch.zeros_like(d), d).squeeze(1)
        if out.sums is not None:
            out.sums.lpos[part], out.sums.lneg[part] = l_pos.squeeze(1), l_neg.squeeze(1)
        if not grad:
            return
        coef = out.coef if isinstance(out.coef, float) else out.coef[part, None]
        unit = coef / (z_neg + (l_pos - shift).exp())
        e.mul_(unit)  # coef p_ij over the negatives
        p_neg = unit * z_neg
        if need_l is not None and out.dtau is not None:
            if p.hard_negative_weight:  # the weight is not divided by tau
                need_l = self.logit(s)
            need_l = torch.where(e == 0, 0, need_l)  # keys that do not count: 0 * -inf
            out.dtau[part] = -((e * need_l).sum(1) - (p_neg * l_pos).squeeze(1)) / self.tau
        if out.dm is not None:
            out.dm[part] = (e * s).sum(1) / self.tau
        G = e.mul_(self.slope(s)).mul_(out.r2)
        G.scatter_(1, pos, -p_neg * self.positive_slope(s_pos) * out.r2[pos])
        S.copy_(G)

    def columns(self, S: Tensor, i0: int) -> None:
        sums = self.state.sums
        assert sums is not None
        s, pos, _, i = self._panel(S, i0)
        l = self._negatives(s, pos, self.state.s_pos, i) / math.log(2)
        top = torch.maximum(sums.column_max, l.amax(0))
        safe = torch.where(torch.isneginf(top), 0, top)
        sums.column_sum.mul_((sums.column_max - safe).exp2()).add_((l - safe).exp2().sum(0))
        sums.column_max.copy_(top)

    def symmetric(self, S: Tensor, i0: int) -> None:
        p, out, sums = self.p, self.state, self.state.sums
        assert sums is not None
        part = slice(i0, i0 + S.shape[0])
        s, pos, s_pos, i = self._panel(S, i0)
        l_pos = self.positive_logit(s_pos)
        coef = torch.as_tensor(out.coef, dtype=p.acc, device=S.device).expand(p.z1.shape[0])
        lse = torch.logaddexp(sums.lneg[part], sums.lpos[part])[:, None].to(p.acc)
        # Exponents of probabilities are above 0 by rounding only: of logits beyond 1e8 that is a lot.
        P = coef[part, None] * (self._negatives(s, pos, s_pos, i) - lse).clamp_max_(0).exp_()
        P += coef * (self._negatives(s, pos, self.state.s_pos, i) - sums.lse_column).clamp_max_(0).exp_()
        P *= 0.5
        sigma = torch.sigmoid(sums.lneg[part] - sums.lpos[part]) + torch.sigmoid(
            sums.lneg_column[part] - sums.lpos[part]
        )
        P_pos = (-0.5 * coef[part] * sigma)[:, None].to(p.acc)
        if out.dtau is not None:
            out.dtau[part] = -((P * self.logit(s)).sum(1) + (P_pos * l_pos).squeeze(1)) / self.tau
        if out.dm is not None:
            out.dm[part] = (P * s).sum(1) / self.tau
        G = P.mul_(self.slope(s)).mul_(out.r2)
        G.scatter_(1, pos, P_pos * self.positive_slope(s_pos) * out.r2[pos])
        S.copy_(G)


def contrastive(p: Contrastive) -> Result:
    return panel.contrastive(p, Kernels)
