"""Launches kernels/triton/supervised.py for the panel driver. Nothing here waits for the device."""

from __future__ import annotations

import math

from torch import Tensor

from pycse.backends.triton.norms import Norms, block_of, on_device_of, warps_of
from pycse.kernels.triton import supervised as kernels
from pycse.panels import contrastive as panel
from pycse.problem import Result, Supervised


class Kernels(Norms, panel.Kernels):
    p: Supervised

    def __init__(self, p: Supervised, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        self.B, self.N = p.B, state.r2.shape[0]
        self.coef = self.number(state.coef, self.B)  # row by row where it is a tensor
        self.b = self.number(p.sharpness())
        self.shift = None if p.shift is None else self.number(p.shift / math.log(2))
        self.block = block_of(self.N)

    def rows(self, S: Tensor, i0: int, grad: bool) -> Tensor | None:
        p, out = self.p, self.state
        f = self.new(S.shape[0]) if grad else None
        kernels.rows[(S.shape[0],)](
            S, out.r2, p.ids1, p.key_ids, self.coef, out.loss, out.dlogit if grad else None, f, self.b, self.shift,
            i0, self.B, self.N, S.stride(0),
            SAME=p.same, INSIDE=p.inside, BLOCK=self.block, num_warps=warps_of(self.block),
        )  # fmt: skip
        return f


def supervised(p: Supervised) -> Result:
    with on_device_of(p.z1):
        return panel.contrastive(p, Kernels)
