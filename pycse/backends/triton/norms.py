"""What the Kernels of every operator share: numbers, launch sizes, normalisation and its gradient
(kernels/triton/norms.py)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from pycse.kernels.triton import norms as kernels
from pycse.panels import norms

ACC: dict[torch.dtype, Any] = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def block_of(n: int) -> int:
    return min(2048, max(32, triton.next_power_of_2(n)))


def rows_and_block(D: int) -> tuple[int, int]:
    """Of the kernels that take rows of D features: about 2048 numbers to a program."""
    block = block_of(D)
    return max(1, min(16, 2048 // block)), block


def warps_of(block: int) -> int:
    return max(1, min(8, block // 256))


def on_device_of(z: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device and stream: the device is made the tensor's own."""
    return torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()


class Norms(norms.Norms):
    def __init__(self, z: Tensor) -> None:
        self.device, self.acc = z.device, accumulation(z.dtype)

    def number(self, value: float | Tensor, *shape: int) -> float | Tensor:
        """What kernels take as a number. Triton's float arguments are float32: double precision needs a tensor."""
        return _number(value, self.acc, self.device, *shape)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.acc, device=self.device)

    def normalize(self, z: Tensor, r: Tensor | None, out: Tensor | None, factor: float = 1.0) -> None:
        n, D = z.shape
        acc = accumulation(z.dtype)  # a teacher's type may differ from the student's
        rows, block = rows_and_block(D)
        kernels.normalize[(triton.cdiv(n, rows),)](
            z, r, out, None if factor == 1 else _number(factor, acc, z.device), n, D, z.stride(0),
            0 if out is None else out.stride(0), ACC=ACC[acc], ROWS=rows, BLOCK=block, num_warps=warps_of(rows * block),
        )  # fmt: skip

    def project(
        self, z: Tensor, g: Tensor, r: Tensor, out: Tensor, f: Tensor | None = None, scaled: bool = False
    ) -> None:
        n, D = z.shape
        g = g if g.stride(1) == 1 else g.contiguous()  # sums of CPU tensors come transposed
        rows, block = rows_and_block(D)
        kernels.project[(triton.cdiv(n, rows),)](
            z, g, r, f, out, n, D, z.stride(0), g.stride(0), out.stride(0),
            SCALED=scaled, ROWS=rows, BLOCK=block, num_warps=warps_of(rows * block),
        )  # fmt: skip


def _number(value: float | Tensor, acc: torch.dtype, device: torch.device, *shape: int) -> float | Tensor:
    if isinstance(value, Tensor) or acc != torch.float64:
        return value if isinstance(value, Tensor) else float(value)
    return torch.full(shape, value, dtype=torch.float64, device=device)
