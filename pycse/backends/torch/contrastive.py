"""The row kernels of the panel driver in plain PyTorch: any device, no compiler.

Formulas as in kernels/cpu/rows.h and symmetric.h; the panel is promoted to the accumulation type, so a visit takes a
few temporaries of the panel's size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycse.backends.torch.norms import Norms
from pycse.logits import Coefficients
from pycse.panels import contrastive as panel
from pycse.panels import parts
from pycse.problem import Contrastive, Result


class Kernels(Norms, panel.Kernels):
    temporaries = 4  # c x N copies alive at once: the driver takes fewer rows
    p: Contrastive

    def __init__(self, p: Contrastive, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        self.coefficients = Coefficients(*p.coefficients())
        self.linear = p.logit.linear

    def logit(self, s: Tensor) -> Tensor:
        k = self.coefficients
        return s * k.b if self.linear else s * (s * k.q + k.b)

    def slope(self, s: Tensor) -> Tensor | float:
        k = self.coefficients
        return k.slope if self.linear else s * (2 * k.q) + k.slope

    def positive_logit(self, s: Tensor) -> Tensor:
        k = self.coefficients
        return s * (s * k.positive_q + k.positive_b) + k.positive_c

    def positive_slope(self, s: Tensor) -> Tensor | float:
        k = self.coefficients
        return s * (2 * k.positive_q) + k.positive_b

    def store_gradients(self, part: slice, P: Tensor, s: Tensor, P_pos: Tensor, s_pos: Tensor) -> None:
        """dLoss/dl of the negatives and of the positives (n, 1), which are summed over what a row has."""
        assert self.state.dlogit is not None
        Ps, Ps_pos = P * s, (P_pos * s_pos).squeeze(1)
        rows = (Ps_pos * s_pos.squeeze(1), Ps_pos, P_pos.squeeze(1), (Ps * s).sum(1), Ps.sum(1))
        self.state.dlogit[:, part] = torch.stack(rows)

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

    def _negatives(self, s: Tensor, pos: Tensor, i: Tensor, threshold: Tensor | None) -> Tensor:
        """Logits with -inf where a key is no negative of its row (or, with the columns' thresholds, of its column)."""
        p = self.p
        l = self.logit(s)
        if p.logit.has_own:
            B, k = p.B, self.coefficients
            own = torch.arange(1, s.shape[1] // B, dtype=torch.int64, device=s.device) * B + i[:, None]
            l.scatter_add_(1, own, s.gather(1, own) * k.own_b + k.own_c)
        if p.query_ids is not None and p.key_ids is not None:
            l.masked_fill_(p.query_ids[i, None] == p.key_ids, -torch.inf)
        if threshold is not None:
            l.masked_fill_(s > threshold, -torch.inf)
        return l.scatter_(1, pos, -torch.inf)

    def _row_threshold(self, s_pos: Tensor, part: slice) -> Tensor | None:
        return self.p.threshold(s_pos, part) if self.p.excludes else None

    def _column_threshold(self) -> Tensor | None:
        if not self.p.excludes:
            return None
        assert self.state.s_pos is not None
        return self.p.threshold(self.state.s_pos)

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        p, out = self.p, self.state
        part = slice(i0, i0 + S.shape[0])
        s, pos, s_pos, i = self._panel(S, i0)
        l = self._negatives(s, pos, i, self._row_threshold(s_pos, part))
        if out.T is not None:
            l.masked_fill_(p.guide_threshold(out.T.gather(1, pos)) < out.T, -torch.inf)
        l_pos = self.positive_logit(s_pos)
        shift = torch.maximum(l.amax(1, keepdim=True), l_pos)
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
        if out.dlogit is not None:
            self.store_gradients(part, e, s, -p_neg, s_pos)
        G = e.mul_(self.slope(s)).mul_(out.r2)
        G.scatter_(1, pos, -p_neg * self.positive_slope(s_pos) * out.r2[pos])
        S.copy_(G)

    def columns(self, S: Tensor, i0: int) -> None:
        sums = self.state.sums
        assert sums is not None
        s, pos, _, i = self._panel(S, i0)
        l = self._negatives(s, pos, i, self._column_threshold()) / math.log(2)
        top = torch.maximum(sums.column_max, l.amax(0))
        safe = torch.where(torch.isneginf(top), 0, top)
        sums.column_sum.mul_((sums.column_max - safe).exp2()).add_((l - safe).exp2().sum(0))
        sums.column_max.copy_(top)

    def symmetric(self, S: Tensor, i0: int) -> None:
        p, out, sums = self.p, self.state, self.state.sums
        assert sums is not None
        part = slice(i0, i0 + S.shape[0])
        s, pos, s_pos, i = self._panel(S, i0)
        coef = torch.as_tensor(out.coef, dtype=p.acc, device=S.device).expand(p.B)
        lse = torch.logaddexp(sums.lneg[part], sums.lpos[part])[:, None].to(p.acc)
        # Exponents of probabilities are above 0 by rounding only: of logits beyond 1e8 that is a lot.
        P = coef[part, None] * (self._negatives(s, pos, i, self._row_threshold(s_pos, part)) - lse).clamp_max_(0).exp_()
        P += coef * (self._negatives(s, pos, i, self._column_threshold()) - sums.lse_column).clamp_max_(0).exp_()
        P *= 0.5
        sigma = torch.sigmoid(sums.lneg[part] - sums.lpos[part]) + torch.sigmoid(
            sums.lneg_column[part] - sums.lpos[part]
        )
        P_pos = (-0.5 * coef[part] * sigma)[:, None].to(p.acc)
        if out.dlogit is not None:
            self.store_gradients(part, P, s, P_pos, s_pos)
        G = P.mul_(self.slope(s)).mul_(out.r2)
        G.scatter_(1, pos, P_pos * self.positive_slope(s_pos) * out.r2[pos])
        S.copy_(G)


def contrastive(p: Contrastive) -> Result:
    return (parts if p.in_parts else panel).contrastive(p, Kernels)
