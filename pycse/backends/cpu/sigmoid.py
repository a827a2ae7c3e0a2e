"""The C++ row kernel of kernels/cpu/sigmoid.h around the products of products.py."""

from __future__ import annotations

from torch import Tensor

from pycse.backends.addresses import pointer
from pycse.backends.cpu.products import Products
from pycse.logits import Coefficients
from pycse.panels import contrastive as panel
from pycse.problem import Result, Sigmoid


class Kernels(Products, panel.Kernels):
    p: Sigmoid

    def __init__(self, p: Sigmoid, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        (B, _), N = p.z1.shape, p.z2.shape[0]
        scale, bias = p.numbers()  # on a CPU read already
        shared = dict(r2=pointer(state.r2), s_pos=pointer(state.s_pos), positives=pointer(p.positives))
        self.problem = self.native.Sigmoid(
            B=B, N=N, scale=scale, bias=bias, query_ids=pointer(p.query_ids), key_ids=pointer(p.key_ids),
            coef=pointer(state.coef), coef_all=1.0 if isinstance(state.coef, Tensor) else state.coef,
            loss=pointer(state.loss), dlogit=pointer(state.dlogit), **shared,
        )  # fmt: skip
        if state.s_pos is not None:  # the positives' similarities are those of any loss
            self.own = self.native.Contrastive(B=B, N=N, logit=(0.0,) * len(Coefficients._fields), **shared)

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        self.native.sigmoid(self.problem, self.code, S.data_ptr(), S.stride(0), i0, S.shape[0], self.threads, grad)

    def positives(self, z1hat: Tensor, i0: int) -> None:
        z2 = self.p.z2
        self.native.positives(
            self.own, self.code, z1hat.data_ptr(), z1hat.stride(0), z2.data_ptr(), z2.stride(0), z1hat.shape[1],
            i0, z1hat.shape[0], self.threads,
        )  # fmt: skip


def sigmoid(p: Sigmoid) -> Result:
    return panel.contrastive(p, Kernels)
