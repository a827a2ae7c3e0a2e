"""The sigmoid loss's row kernel in plain PyTorch: any device, no compiler. Formulas as in kernels/cpu/sigmoid.h."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pycse.backends.torch.norms import Norms
from pycse.panels import contrastive as panel
from pycse.problem import Result, Sigmoid


class Kernels(Norms, panel.Kernels):
    temporaries = 5  # c x N copies alive at once: the driver takes fewer rows
    p: Sigmoid

    def __init__(self, p: Sigmoid, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        self.scale, self.bias = p.numbers()

    def _panel(self, S: Tensor, i0: int) -> tuple[Tensor, Tensor]:
        """s, and which pairs are positive. An index that is no key (unread, on a GPU) gives a NaN row."""
        p, part = self.p, slice(i0, i0 + S.shape[0])
        s = S.to(p.acc) * self.state.r2
        if p.query_ids is not None and p.key_ids is not None:
            return s, p.query_ids[part, None] == p.key_ids
        if p.positives is None:
            pos = torch.arange(i0, i0 + S.shape[0], dtype=torch.int64, device=S.device)
        else:
            pos = p.positives[part]
        valid = ((pos >= 0) & (pos < S.shape[1]))[:, None]
        pos = pos.clamp(0, S.shape[1] - 1)[:, None]
        s_pos = s.gather(1, pos) if self.state.s_pos is None else self.state.s_pos[part, None]
        s.scatter_(1, pos, torch.where(valid, s_pos, torch.nan))
        return s, torch.zeros(s.shape, dtype=torch.bool, device=s.device).scatter_(1, pos, True)

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        out, part = self.state, slice(i0, i0 + S.shape[0])
        s, positive = self._panel(S, i0)
        x = s * self.scale + self.bias
        x = torch.where(positive, -x, x)  # the loss is log(1 + exp(x)) of all pairs now
        out.loss[part] = -F.logsigmoid(-x).sum(1)
        if not grad:
            return
        P = x.sigmoid_()
        P = torch.where(positive, -P, P).mul_(out.coef if isinstance(out.coef, float) else out.coef[part, None])
        if out.dlogit is not None:
            out.dlogit[:, part] = torch.stack([(P * s).sum(1), P.sum(1)])
        S.copy_(P.mul_(self.scale).mul_(out.r2))


def sigmoid(p: Sigmoid) -> Result:
    return panel.contrastive(p, Kernels)
