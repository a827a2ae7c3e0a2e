"""The C++ row kernel of kernels/cpu/uniformity.h around the products of products.py."""

from __future__ import annotations

from torch import Tensor

from pycse.backends.cpu.products import Products
from pycse.panels import alignment as pairs
from pycse.panels import uniformity as panel
from pycse.problem import Alignment, Result, Uniformity


class Kernels(Products, panel.Kernels):
    def __init__(self, p: Uniformity, bias: Tensor, sums: Tensor) -> None:
        super().__init__(p.z)
        self.problem = self.native.Uniformity(u=2 * p.t * panel.LOG2E, bias=bias.data_ptr(), sums=sums.data_ptr())

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        self.native.uniformity(self.problem, self.code, S.data_ptr(), S.stride(0), i0, *S.shape, grad, self.threads)


def uniformity(p: Uniformity) -> Result:
    return panel.uniformity(p, Kernels)


def alignment(p: Alignment) -> Result:
    return pairs.alignment(p, Products(p.x))
