"""Products of panels: float32 through kernels/cpu/tiles.h where the processor has AMX, PyTorch's GEMMs for what does
not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.backends.cpu.norms import Norms
from pycse.panels import products

LEAST = 8 << 20  # multiply-adds from which tiles beat MKL
LEAST_ROWS = 128  # of a in a b where b is row-major: its tiles are made once for all rows
STEP = 32  # tiles take multiples; the rest of a ragged side goes to MKL


class Products(Norms, products.Products):
    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return out if self._tiled(out, a, b, False) else super().product(a, b, out)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if not self._tiled(total, a, b, True):
            super().add_product(total, a, b)

    def _tiled(self, total: Tensor, a: Tensor, b: Tensor, add: bool) -> bool:
        """total (+)= a b in tiles; False, and nothing done, where that is not possible or not faster."""
        (M, K), N = a.shape, b.shape[1]
        if not (a.dtype == b.dtype == total.dtype == torch.float32 and self.native.has_dense_products()):
            return False
        if M * K * N < LEAST or min(M, K, N) < STEP or total.stride(1) != 1:
            return False
        rest = torch.Tensor.addmm_ if add else lambda out, left, right: torch.mm(left, right, out=out)
        if a.stride(1) == b.stride(0) == 1 and K % STEP == 0:
            whole = N - N % STEP
            self._product(a, b.t()[:whole], total, False, add)
            if whole < N:
                rest(total[:, whole:], a, b[:, whole:])
        elif a.stride(1) == b.stride(1) == 1 and N % STEP == 0 and M >= LEAST_ROWS:
            whole = K - K % STEP
            self._product(a, b[:whole], total, True, add)
            if whole < K:
                total.addmm_(a[:, whole:], b[whole:])
        elif a.stride(0) == b.stride(1) == 1 and N % STEP == 0 and total.stride(0) == N:
            whole = M - M % STEP
            self.native.dense_outer(
                a.data_ptr(), a.stride(1), b.data_ptr(), b.stride(0), whole, N, total.data_ptr(), K, add, self.threads
            )
            if whole < M:
                rest(total[whole:], a[whole:], b)
        else:
            return False
        return True

    def _product(self, x: Tensor, w: Tensor, y: Tensor, transposed: bool, add: bool) -> None:
        """y (+)= x w^T, or x w where ``transposed``."""
        self.native.dense_product(
            x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0), *w.shape, y.data_ptr(), y.stride(0), x.shape[0],
            transposed, add, self.threads,
        )  # fmt: skip
