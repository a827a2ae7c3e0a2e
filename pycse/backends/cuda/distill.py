"""The CUDA row kernel of kernels/cuda/distill.h around PyTorch's GEMMs. Nothing here waits for the device; a seed in a
tensor is read by the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.backends.addresses import CODES, DIVERGENCES, GROUPINGS, pointer
from pycse.backends.cuda.norms import Norms
from pycse.panels import distill as panel
from pycse.problem import Distillation, Result


class Kernels(Norms, panel.Kernels):
    def __init__(self, d: Distillation, state: panel.State) -> None:
        super().__init__(d.z1)
        self.d, self.state = d, state
        cut, seed, coef = d.cut, d.seed, state.coef
        self.scratch: Tensor | None = None
        self.problem = self.kernels.Distill(
            B=d.B,
            student_temperature=d.student_temperature,
            teacher_temperature=d.teacher_temperature,
            group_temperature=d.group_temperature,
            divergence=DIVERGENCES[d.divergence],
            grouping=0 if cut is None else GROUPINGS[cut.kind],
            group_value=0.0 if cut is None else cut.value,
            group_end=0 if cut is None else cut.end,
            sample=d.shuffle == "sample",
            seed=0 if isinstance(seed, Tensor) else seed % 2**64,
            seed_at=pointer(seed),
            coef=pointer(coef),
            coef_all=1.0 if isinstance(coef, Tensor) else coef,
            loss=state.loss.data_ptr(),
        )

    def rows(self, S: Tensor, T: Tensor, i0: int, grad: bool) -> None:
        c = S.shape[0]
        if self.scratch is None and self.d.cut is not None:  # the first panel has the most rows
            size = self.kernels.scratch(self.problem, self.code, c, self.queue)
            self.scratch = self.empty(*size, dtype=torch.uint8)
        rows = 0 if self.scratch is None else self.scratch.shape[0]
        self.kernels.distill(
            self.problem, self.code, S.data_ptr(), S.stride(0), i0, c, CODES[T.dtype], T.data_ptr(), T.stride(0),
            pointer(self.scratch) if rows else 0, rows, grad, self.queue,
        )  # fmt: skip


def distill(d: Distillation) -> Result:
    return panel.distill(d, Kernels)
