"""Similarities of rows and their positives, for losses that have one a row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pycse.backends.cpu.products import Products
from pycse.panels import contrastive as panel


class Positives(Products, panel.Kernels):
    problem: Any  # a native Contrastive: r2, s_pos and positives are looked at

    def positives(self, z1hat: Tensor, i0: int) -> None:
        z2 = self.p.z2
        self.native.positives(
            self.problem, self.code, z1hat.data_ptr(), z1hat.stride(0), z2.data_ptr(), z2.stride(0), z1hat.shape[1],
            i0, z1hat.shape[0], self.threads,
        )  # fmt: skip
