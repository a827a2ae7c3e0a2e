"""The C++ row kernel of kernels/cpu/sigmoid.h around the products of products.py."""

from __future__ import annotations

from torch import Tensor

from pycse.backends.addresses import pointer
from pycse.backends.cpu.positives import Positives
from pycse.logits import Coefficients
from pycse.panels import contrastive as panel
from pycse.problem import Result, Sigmoid


class Kernels(Positives):
    p: Sigmoid

    def __init__(self, p: Sigmoid, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        B, N = p.B, p.z2.shape[0]
        scale, bias = p.numbers()  # on a CPU read already
        shared = dict(r2=pointer(state.r2), s_pos=pointer(state.s_pos), positives=pointer(p.positives))
        self.pairs = self.native.Sigmoid(
            B=B, N=N, scale=scale, bias=bias, query_ids=pointer(p.query_ids), key_ids=pointer(p.key_ids),
            coef=pointer(state.coef), coef_all=1.0 if isinstance(state.coef, Tensor) else state.coef,
            loss=pointer(state.loss), dlogit=pointer(state.dlogit), **shared,
        )  # fmt: skip
        if state.s_pos is not None:  # the positives' similarities are those of any loss
            self.problem = self.native.Contrastive(B=B, N=N, logit=(0.0,) * len(Coefficients._fields), **shared)

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        self.native.sigmoid(self.pairs, self.code, S.data_ptr(), S.stride(0), i0, S.shape[0], self.threads, grad)


def sigmoid(p: Sigmoid) -> Result:
    return panel.contrastive(p, Kernels)
