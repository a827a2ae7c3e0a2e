"""The C++ row kernel of kernels/cpu/prefixes.h around the products of products.py."""

from __future__ import annotations

from torch import Tensor

from pycse.backends.addresses import CODES, pointer
from pycse.backends.cpu.contrastive import native_problem, row_bounds
from pycse.backends.cpu.products import Products
from pycse.kernels import native
from pycse.panels import prefixes as panel
from pycse.panels.contrastive import State
from pycse.problem import Contrastive


class Kernels(Products, panel.Kernels):
    most = 16  # kMostLengths

    def __init__(self, lengths: list[Contrastive], states: list[State]) -> None:
        first = lengths[0]
        super().__init__(first.z1)
        self.bounds = row_bounds(first)  # alive for the kernels
        self.states = states
        self.problems = [
            native_problem(
                p, state.coef, self.bounds, r2=state.r2, s_pos=state.s_pos, loss=state.loss, dlogit=state.dlogit
            )
            for p, state in zip(lengths, states)
        ]

    def visit(
        self, S: Tensor, rho: Tensor, i0: int, t: Tensor | None, columns: Tensor | None, T: Tensor | None
    ) -> None:
        guide = () if T is None else (T.data_ptr(), T.stride(0), CODES[T.dtype])
        native().prefixes(
            self.problems, self.code, S.data_ptr(), S.stride(1), S.stride(0), i0, S.shape[1], rho.data_ptr(),
            pointer(t), pointer(columns), self.threads, t is not None, *guide,
        )  # fmt: skip
