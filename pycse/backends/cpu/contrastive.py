"""The C++ kernels of kernels/cpu around the products of products.py; small batches in one native call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycse.backends.addresses import CODES, pointer
from pycse.backends.cpu.positives import Positives
from pycse.choices import EXCLUDE_BY
from pycse.kernels import native
from pycse.logits import GRADIENTS
from pycse.panels import contrastive as panel
from pycse.panels import parts
from pycse.problem import Contrastive, Result

# Multiply-adds B N D up to which the native products beat PyTorch's GEMMs and their dispatch
# (docs/performance.md, "small batches").
SMALL = {torch.float32: 16 << 20, torch.bfloat16: 4 << 20}


def native_problem(p: Contrastive, coef: Tensor | float, exclude_each: Tensor | None, **tensors: Tensor | None):
    coefficients = p.coefficients()
    assert not isinstance(coefficients, Tensor)  # on a CPU the numbers are known
    given: dict[str, Any] = {"coef": coef.data_ptr()} if isinstance(coef, Tensor) else {"coef_all": coef}
    if p.excludes:
        given |= {"exclude_by": EXCLUDE_BY.index(p.exclude_by), "exclude_above": p.exclude_above or 0.0}
    if p.guided:
        given |= {"guide_by": EXCLUDE_BY.index(p.guide_by), "guide_above": p.guide_above}
    tensors |= {
        "exclude_each": exclude_each, "positives": p.positives, "query_ids": p.query_ids, "key_ids": p.key_ids,
    }  # fmt: skip
    given.update([(name, t.data_ptr()) for name, t in tensors.items() if t is not None])
    return native().Contrastive(B=p.B, N=p.z2.shape[0], logit=coefficients, shift=p.shift, **given)


def row_bounds(p: Contrastive) -> Tensor | None:
    """The rows' bounds as kernels read them."""
    return None if p.exclude_each is None else p.exclude_each.to(p.acc).contiguous()


class Kernels(Positives):
    statistics = torch.float64
    p: Contrastive

    def __init__(self, p: Contrastive, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        if p.symmetric and not isinstance(state.coef, Tensor):  # columns need their rows' coefficients
            state.coef = torch.full((p.B,), state.coef, dtype=p.acc, device=p.z1.device)
        self.exclude_each = row_bounds(p)  # alive for the kernels
        sums = {} if state.sums is None else vars(state.sums)
        self.problem = native_problem(
            p, state.coef, self.exclude_each, r2=state.r2, s_pos=state.s_pos, loss=state.loss, dlogit=state.dlogit,
            **sums,
        )  # fmt: skip

    def _panel(self, S: Tensor, i0: int) -> tuple[int, ...]:
        return self.code, S.data_ptr(), S.stride(0), i0, S.shape[0]

    def rows(self, S: Tensor, i0: int, grad: bool) -> Tensor | None:
        f = torch.empty(S.shape[0], dtype=self.p.acc, device=S.device) if grad else None
        T = self.state.T
        guide = () if T is None else (T.data_ptr(), T.stride(0), CODES[T.dtype])
        self.native.rows(self.problem, *self._panel(S, i0), pointer(f), self.threads, grad, *guide)
        return f

    def columns(self, S: Tensor, i0: int) -> None:
        self.native.columns(self.problem, *self._panel(S, i0), self.threads)

    def symmetric(self, S: Tensor, i0: int) -> None:
        self.native.symmetric(self.problem, *self._panel(S, i0), self.threads)


def _small(p: Contrastive) -> Result | None:
    """None for embeddings so long that their products might overflow: the panels normalise rows first."""
    kernels, code = native(), CODES[p.z1.dtype]
    (B, D), N = p.z1.shape, p.z2.shape[0]
    new, wide = p.z1.new_empty, torch.float32
    rows, loss = new(B, dtype=wide), new((), dtype=wide)
    work = new(kernels.small_work_size(B, N, D, code, p.symmetric), dtype=wide)
    dz1 = new(B, D) if p.needs.z1 else None
    dz2 = new(N, D) if p.needs.z2 else None
    dlogit = new(GRADIENTS, B, dtype=wide) if p.trained else None
    coef, each = p.row_coefficients(), row_bounds(p)
    done = kernels.small(
        native_problem(p, coef, each, loss=rows, dlogit=dlogit),
        code,
        D,
        p.z1.data_ptr(),
        p.z1.stride(0),
        p.z2.data_ptr(),
        p.z2.stride(0),
        p.normalize,
        p.symmetric,
        work.data_ptr(),
        pointer(dz1),
        pointer(dz2),
        loss.data_ptr(),
        torch.get_num_threads(),
    )
    if not done:
        return None
    return p.result(rows, dz1, dz2, dlogit, loss=loss)


def contrastive(p: Contrastive) -> Result:
    if p.in_parts:
        return parts.contrastive(p, Kernels)
    work = p.z1.shape[0] * p.z2.shape[0] * p.z1.shape[1]
    if work <= SMALL.get(p.z1.dtype, 0) and not p.guided and not p.share.total and (result := _small(p)) is not None:
        return result
    return panel.contrastive(p, Kernels)
