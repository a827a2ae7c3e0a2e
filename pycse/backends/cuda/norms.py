"""Memory, the queue, normalisation and its gradient through kernels/cuda/norms.h. Nothing here waits for the device, so
calls can be captured in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycse.backends.addresses import CODES, pointer
from pycse.panels import norms

LARGEST = 2**31 - 1 - 2048  # rows, keys and features are counted in 32 bits; addresses are not


class Norms(norms.Norms):
    @staticmethod
    def native() -> Any:
        from pycse.kernels import native

        return native().cuda

    def __init__(self, z: Tensor, *sizes: int) -> None:
        if (most := max(*z.shape, *sizes)) > LARGEST:
            raise ValueError(f"backend='cuda' takes up to {LARGEST} rows, keys and features, not {most}")
        self.device, self.code, self.kernels = z.device, CODES[z.dtype], self.native()
        self.queue = (z.device.index, torch.cuda.current_stream(z.device).cuda_stream) if z.is_cuda else (0, 0)

    def normalize(self, z: Tensor, r: Tensor | None, out: Tensor | None, factor: float = 1.0) -> None:
        self.kernels.normalize(
            CODES[z.dtype], z.data_ptr(), z.stride(0), *z.shape, pointer(r), pointer(out),
            0 if out is None else out.stride(0), factor, self.queue,
        )  # fmt: skip

    def project(
        self, z: Tensor, g: Tensor, r: Tensor, out: Tensor, f: Tensor | None = None, scaled: bool = False
    ) -> None:
        g = g.contiguous()
        self.kernels.project(
            self.code, CODES[g.dtype], z.data_ptr(), z.stride(0), *z.shape, g.data_ptr(), r.data_ptr(), pointer(f),
            scaled, out.data_ptr(), self.queue,
        )  # fmt: skip
