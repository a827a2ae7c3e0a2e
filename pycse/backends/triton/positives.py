"""Similarities of rows and their positives, for losses that have one a row."""

from __future__ import annotations

from torch import Tensor

from pycse.backends.triton.norms import Norms, block_of, warps_of
from pycse.kernels.triton import contrastive as row_kernels
from pycse.panels import contrastive as panel


class Positives(Norms, panel.Kernels):
    N: int

    def positives(self, z1hat: Tensor, i0: int) -> None:
        p, out, (c, D) = self.p, self.state, z1hat.shape
        block = block_of(D)
        row_kernels.positives[(c,)](
            z1hat, p.z2, out.r2, p.positives, out.s_pos, i0, self.N, D, z1hat.stride(0), p.z2.stride(0),
            BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
