"""The row kernel of uniformity in plain PyTorch: any device, no compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.backends.torch.norms import Norms
from pycse.panels import alignment as pairs
from pycse.panels import uniformity as panel
from pycse.problem import Alignment, Result, Uniformity


class Kernels(Norms, panel.Kernels):
    temporaries = 1

    def __init__(self, p: Uniformity, bias: Tensor, sums: Tensor) -> None:
        super().__init__(p.z)
        self.u, self.bias, self.sums = 2 * p.t * panel.LOG2E, bias, sums

    def rows(self, S: Tensor, i0: int, grad: bool) -> None:
        c = S.shape[0]
        x = torch.add(self.bias[i0:], S.to(self.bias.dtype), alpha=self.u).add_(self.bias[i0 : i0 + c, None]).exp2_()
        x.diagonal().zero_()
        self.sums[i0 : i0 + c] = x[:, :c].sum(1) + 2 * x[:, c:].sum(1)
        if grad:
            S.copy_(x)


def uniformity(p: Uniformity) -> Result:
    return panel.uniformity(p, Kernels)


def alignment(p: Alignment) -> Result:
    return pairs.alignment(p, Norms(p.x))
