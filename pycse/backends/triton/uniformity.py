"""Launches kernels/triton/uniformity.py for the panel driver. Nothing waits for the device."""

from __future__ import annotations

from torch import Tensor

from pycse.backends.triton.norms import Norms, block_of, on_device_of, warps_of
from pycse.kernels.triton import uniformity as kernels
from pycse.panels import alignment as pairs
from pycse.panels import uniformity as panel
from pycse.problem import Alignment, Result, Uniformity


class Kernels(Norms, panel.Kernels):
    def __init__(self, p: Uniformity, bias: Tensor, sums: Tensor) -> None:
        super().__init__(p.z)
        self.u, self.bias, self.sums = self.number(2 * p.t * panel.LOG2E), bias, sums

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        c, n = S.shape
        block = block_of(n)
        kernels.rows[(c,)](
            S, self.bias, self.sums, self.u, i0, c, n, S.stride(0), GRAD=grad, BLOCK=block, num_warps=warps_of(block)
        )


def uniformity(p: Uniformity) -> Result:
    with on_device_of(p.z):
        return panel.uniformity(p, Kernels)


def alignment(p: Alignment) -> Result:
    with on_device_of(p.x):
        return pairs.alignment(p, Norms(p.x))
