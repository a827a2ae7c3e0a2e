"""The C++ row kernel of kernels/cpu/adapacse.h around the products of products.py."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.backends.addresses import CODES, pointer
from pycse.backends.cpu.positives import Positives
from pycse.logits import Coefficients
from pycse.panels import contrastive as panel
from pycse.problem import Angular, Result


class Kernels(Positives):
    p: Angular

    def __init__(self, p: Angular, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        b = p.sharpness()  # on a CPU read already
        assert not isinstance(b, Tensor)
        self.problem = self.native.Contrastive(
            B=p.B, N=p.z2.shape[0], logit=Coefficients(0.0, b, 0.0, 0.0, b, b, 0.0, 0.0), shift=p.shift,
            r2=pointer(state.r2), s_pos=pointer(state.s_pos), positives=pointer(p.positives),
            query_ids=pointer(p.query_ids), key_ids=pointer(p.key_ids),
            coef=pointer(state.coef), coef_all=1.0 if isinstance(state.coef, Tensor) else state.coef,
            loss=pointer(state.loss), dlogit=pointer(state.dlogit),
        )  # fmt: skip

    def rows(self, S: Tensor, i0: int, grad: bool) -> Tensor | None:
        f = torch.empty(S.shape[0], dtype=self.p.acc, device=S.device) if grad else None
        T = self.state.T
        assert T is not None
        self.native.adapacse(
            self.problem, self.p.m, self.code, S.data_ptr(), S.stride(0), i0, S.shape[0], pointer(f),
            T.data_ptr(), T.stride(0), CODES[T.dtype], self.threads, grad,
        )  # fmt: skip
        return f


def adapacse(p: Angular) -> Result:
    return panel.contrastive(p, Kernels)
