"""The C++ row kernel of kernels/cpu/distill.h around PyTorch's GEMMs."""

from __future__ import annotations

from torch import Tensor

from pycse.backends.addresses import CODES, DIVERGENCES, GROUPINGS, pointer
from pycse.backends.cpu.norms import Norms
from pycse.kernels import native
from pycse.panels import distill as panel
from pycse.problem import Distillation, Result


def _problem(d: Distillation, coef: Tensor | float, loss: Tensor):
    cut = d.cut
    return native().Distill(
        d.z1.shape[0],
        d.student_temperature,
        d.teacher_temperature,
        d.group_temperature,
        DIVERGENCES[d.divergence],
        0 if cut is None else GROUPINGS[cut.kind],
        0.0 if cut is None else cut.value,
        0 if cut is None else cut.end,
        d.shuffle == "sample",
        int(d.seed) % 2**64,
        pointer(coef),
        1.0 if isinstance(coef, Tensor) else coef,
        loss.data_ptr(),
    )


class Kernels(Norms, panel.Kernels):
    def __init__(self, d: Distillation, state: panel.State) -> None:
        super().__init__(d.z1)
        self.d, self.state = d, state
        self.problem = _problem(d, state.coef, state.loss)

    def rows(self, S: Tensor, T: Tensor, i0: int, grad: bool) -> None:
        self.native.distill(
            self.problem, self.code, S.data_ptr(), S.stride(0), i0, S.shape[0], CODES[T.dtype], T.data_ptr(), T.stride(0),
            grad, self.threads,
        )  # fmt: skip


def distill(d: Distillation) -> Result:
    return panel.distill(d, Kernels)
