"""The CUDA row kernel of kernels/cuda/uniformity.h around PyTorch's GEMMs. Nothing here waits for the device."""

from __future__ import annotations

from torch import Tensor

from pycse.backends.cuda.norms import Norms
from pycse.panels import alignment as pairs
from pycse.panels import uniformity as panel
from pycse.problem import Alignment, Result, Uniformity


class Kernels(Norms, panel.Kernels):
    def __init__(self, p: Uniformity, bias: Tensor, sums: Tensor) -> None:
        super().__init__(p.z)
        self.problem = self.kernels.Uniformity(u=2 * p.t * panel.LOG2E, bias=bias.data_ptr(), sums=sums.data_ptr())

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        self.kernels.uniformity(self.problem, self.code, S.data_ptr(), S.stride(0), i0, *S.shape, grad, self.queue)


def uniformity(p: Uniformity) -> Result:
    return panel.uniformity(p, Kernels)


def alignment(p: Alignment) -> Result:
    return pairs.alignment(p, Norms(p.x))
