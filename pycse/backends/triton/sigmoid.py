"""Launches kernels/triton/sigmoid.py for the panel driver. Nothing here waits for the device."""

from __future__ import annotations

from torch import Tensor

from pycse.backends.triton.norms import block_of, on_device_of, warps_of
from pycse.backends.triton.positives import Positives
from pycse.kernels.triton import sigmoid as kernels
from pycse.panels import contrastive as panel
from pycse.problem import Result, Sigmoid


class Kernels(Positives):
    p: Sigmoid

    def __init__(self, p: Sigmoid, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        self.B, self.N = p.B, p.z2.shape[0]
        self.coef = self.number(state.coef, self.B)  # row by row where it is a tensor
        self.scale, self.bias = (self.number(x) for x in p.numbers())
        self.block = block_of(self.N)

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        p, out = self.p, self.state
        kernels.rows[(S.shape[0],)](
            S, out.r2, out.s_pos, p.positives, p.query_ids, p.key_ids, self.coef, out.loss,
            out.dlogit if grad else None, self.scale, self.bias, i0, self.B, self.N, S.stride(0),
            GRAD=grad, BLOCK=self.block, num_warps=warps_of(self.block),
        )  # fmt: skip


def sigmoid(p: Sigmoid) -> Result:
    with on_device_of(p.z1):
        return panel.contrastive(p, Kernels)
