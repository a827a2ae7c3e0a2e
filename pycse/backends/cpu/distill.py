"""The C++ row kernel of kernels/cpu/distill.h around the products of products.py; small batches in one native call."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.backends.addresses import CODES, DIVERGENCES, GROUPINGS, pointer
from pycse.backends.cpu.products import Products
from pycse.kernels import native
from pycse.panels import distill as panel
from pycse.problem import Distillation, Result

# Multiply-adds B B D up to which the native products beat PyTorch's GEMMs and their dispatch.
SMALL = {torch.float32: 16 << 20, torch.bfloat16: 4 << 20}


def _problem(d: Distillation, coef: Tensor | float, loss: Tensor):
    cut = d.cut
    return native().Distill(
        B=d.B,
        student_temperature=d.student_temperature,
        teacher_temperature=d.teacher_temperature,
        group_temperature=d.group_temperature,
        divergence=DIVERGENCES[d.divergence],
        grouping=0 if cut is None else GROUPINGS[cut.kind],
        group_value=0.0 if cut is None else cut.value,
        group_end=0 if cut is None else cut.end,
        sample=d.shuffle == "sample",
        seed=int(d.seed) % 2**64,
        coef=pointer(coef),
        coef_all=1.0 if isinstance(coef, Tensor) else coef,
        loss=loss.data_ptr(),
    )


class Kernels(Products, panel.Kernels):
    def __init__(self, d: Distillation, state: panel.State) -> None:
        super().__init__(d.z1)
        self.d, self.state = d, state
        self.problem = _problem(d, state.coef, state.loss)

    def rows(self, S: Tensor, T: Tensor, i0: int, grad: bool) -> None:
        self.native.distill(
            self.problem, self.code, S.data_ptr(), S.stride(0), i0, S.shape[0],
            CODES[T.dtype], T.data_ptr(), T.stride(0),
            grad, self.threads,
        )  # fmt: skip


def _small(d: Distillation) -> Result | None:
    """None for embeddings so long that their products might overflow: the panels normalise rows first."""
    kernels, code = native(), CODES[d.z1.dtype]
    B, D = d.z1.shape
    new, wide = d.z1.new_empty, torch.float32
    loss = new(B, dtype=wide)
    work = new(kernels.small_distill_work_size(B, D, len(d.teachers), code), dtype=wide)
    dz = new(B, D) if d.need else None
    coef = d.row_coefficients() * d.factor
    done = kernels.small_distill(
        _problem(d, coef, loss), code, d.z1.data_ptr(), d.z1.stride(0), D, d.normalize,
        [(CODES[e.dtype], e.data_ptr(), e.stride(0), e.shape[1]) for e in d.teachers], d.teacher_weights,
        0 if d.logits is None else CODES[d.logits.dtype], pointer(d.logits),
        0 if d.logits is None else d.logits.stride(0),
        work.data_ptr(), pointer(dz), torch.get_num_threads(),
    )  # fmt: skip
    return Result(loss, dz) if done else None


def _is_small(d: Distillation) -> bool:
    B, D = d.z1.shape
    if B == 1 or d.share.total or SMALL.get(d.z1.dtype, 0) < B * B * D:
        return False
    if d.logits is not None:
        return d.logits.dtype in CODES and d.logits.stride(1) == 1
    return all(e.dtype in SMALL for e in d.teachers)


def distill(d: Distillation) -> Result:
    if _is_small(d) and (result := _small(d)) is not None:
        return result
    return panel.distill(d, Kernels)
