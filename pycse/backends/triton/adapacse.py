"""Launches kernels/triton/adapacse.py for the panel driver. Nothing here waits for the device."""

from __future__ import annotations

import math

from torch import Tensor

from pycse.backends.triton.norms import block_of, on_device_of, warps_of
from pycse.backends.triton.positives import Positives
from pycse.kernels.triton import adapacse as kernels
from pycse.panels import contrastive as panel
from pycse.problem import Angular, Result


class Kernels(Positives):
    p: Angular

    def __init__(self, p: Angular, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        self.B, self.N = p.B, p.z2.shape[0]
        self.coef = self.number(state.coef, self.B)  # row by row where it is a tensor
        self.b = self.number(p.sharpness())
        self.half_m, self.cos_m = self.number(p.m / 2), self.number(math.cos(p.m))
        self.shift = None if p.shift is None else self.number(p.shift / math.log(2))
        self.block = block_of(self.N)

    def rows(self, S: Tensor, i0: int, grad: bool) -> Tensor | None:
        p, out = self.p, self.state
        f = self.new(S.shape[0]) if grad else None
        T = out.T
        assert T is not None
        kernels.rows[(S.shape[0],)](
            S, T, out.r2, out.s_pos, p.positives, p.query_ids, p.key_ids, self.coef, out.loss,
            out.dlogit if grad else None, f, self.b, self.half_m, self.cos_m, self.shift, i0, self.B, self.N,
            S.stride(0), T.stride(0), BLOCK=self.block, num_warps=warps_of(self.block),
        )  # fmt: skip
        return f


def adapacse(p: Angular) -> Result:
    with on_device_of(p.z1):
        return panel.contrastive(p, Kernels)
