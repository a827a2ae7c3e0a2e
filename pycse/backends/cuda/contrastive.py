"""The CUDA kernels of kernels/cuda around PyTorch's GEMMs; small batches in one launch. Nothing here waits
for the device, so calls can be captured in a CUDA graph; numbers in tensors are read by the kernels."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycse.backends.addresses import pointer
from pycse.backends.cuda.norms import Norms
from pycse.choices import EXCLUDE_BY
from pycse.logits import GRADIENTS, Coefficients
from pycse.panels import contrastive as panel
from pycse.problem import Contrastive, Result

# Multiply-adds B N D of a product up to which one launch does everything (kernels/cuda/small.h): its tiles of 64 x 64
# are no match for cuBLAS's, but every launch that it saves costs 2 to 3 us. fp32 has no tensor cores there. Estimates,
# not yet measured.
SMALL = {torch.float32: 1 << 28, torch.bfloat16: 1 << 30}
SMALL_ROWS = 2048  # a row is one block's
# Panels of bf16 go through the GEMM with the loss as its epilogue (kernels/cuda/fused.h) on compute capability 9.0: 1,
# or 2 in clusters of two blocks that share the keys' tiles. 0, off, until it has run on a GPU: compiled, and emulated.
FUSED = 0
FUSED_COLUMNS = 256  # of its tile


NO_NUMBERS = (math.nan,) * len(Coefficients._fields)  # the kernels read others


class Numbers(NamedTuple):
    """What the kernels read of the logit and of the bounds on negatives: alive as long as they run."""

    coefficients: Coefficients | Tensor
    exclude_each: Tensor | None

    @classmethod
    def of(cls, p: Contrastive) -> Numbers:
        for name, given in (("guides", p.guided), ("directions, listed negatives and log-sums", p.in_parts)):
            if given:
                raise RuntimeError(
                    f"backend='cuda' cannot run here: it has no kernels for {name}; triton and torch have"
                )
        return cls(p.coefficients(), None if p.exclude_each is None else p.exclude_each.to(p.acc).contiguous())


def _problem(kernels: Any, p: Contrastive, numbers: Numbers, coef: Tensor | float, **tensors: Tensor | None) -> Any:
    coefficients, exclude_each = numbers
    return kernels.Contrastive(
        B=p.B,
        N=p.z2.shape[0],
        logit=NO_NUMBERS if isinstance(coefficients, Tensor) else coefficients,
        logit_at=pointer(coefficients) if isinstance(coefficients, Tensor) else 0,
        shift=p.shift,
        exclude_by=EXCLUDE_BY.index(p.exclude_by) if p.excludes else None,
        exclude_above=p.exclude_above or 0.0,
        exclude_each=pointer(exclude_each),
        positives=pointer(p.positives),
        query_ids=pointer(p.query_ids),
        key_ids=pointer(p.key_ids),
        coef=pointer(coef),
        coef_all=1.0 if isinstance(coef, Tensor) else coef,
        **{name: pointer(t) for name, t in tensors.items()},
    )


class Kernels(Norms, panel.Kernels):
    p: Contrastive

    def __init__(self, p: Contrastive, state: panel.State) -> None:
        super().__init__(p.z1, p.z2.shape[0])
        self.p, self.state, self.numbers = p, state, Numbers.of(p)
        sums = {} if state.sums is None else vars(state.sums)
        self.problem = _problem(
            self.kernels, p, self.numbers, state.coef, r2=state.r2, s_pos=state.s_pos, loss=state.loss,
            dlogit=state.dlogit, **sums,
        )  # fmt: skip

    def _panel(self, S: Tensor, i0: int) -> tuple[int, ...]:
        return self.code, S.data_ptr(), S.stride(0), i0, S.shape[0]

    def rows(self, S: Tensor, i0: int, grad: bool) -> Tensor | None:
        f = torch.empty(S.shape[0], dtype=self.p.acc, device=S.device) if grad else None
        self.kernels.rows(self.problem, *self._panel(S, i0), pointer(f), grad, self.queue)
        return f

    def columns(self, S: Tensor, i0: int) -> None:
        self.kernels.columns(self.problem, *self._panel(S, i0), self.queue)

    def symmetric(self, S: Tensor, i0: int) -> None:
        self.kernels.symmetric(self.problem, *self._panel(S, i0), self.queue)

    def _fuses(self, z1hat: Tensor) -> bool:
        """The epilogue sees a tile at a time: no row maximum, no threshold. The copy engine takes rows at 16-byte
        addresses."""
        p, out = self.p, self.state
        if not FUSED or p.z1.dtype != torch.bfloat16 or p.shift is None or p.excludes:
            return False
        if out.dlogit is not None or out.sums is not None or p.z2.shape[0] % 8:
            return False
        wide = all(z.data_ptr() % 16 == 0 and z.stride(0) % 8 == 0 for z in (z1hat, p.z2))
        return wide and self.kernels.fused_runs(self.queue)

    def fused_rows(self, z1hat: Tensor, S: Tensor, i0: int, grad: bool) -> Tensor | None:
        if not self._fuses(z1hat):
            return super().fused_rows(z1hat, S, i0, grad)
        z2, (c, N) = self.p.z2, S.shape
        f = self.empty(c, dtype=self.p.acc) if grad else None
        partial = self.empty(-(-N // FUSED_COLUMNS), c, dtype=self.p.acc)
        self.kernels.fused(
            self.problem, z1hat.data_ptr(), z1hat.stride(0), z2.data_ptr(), z2.stride(0), z2.shape[1], S.data_ptr(),
            S.stride(0), i0, c, pointer(f), partial.data_ptr(), grad, FUSED, self.queue,
        )  # fmt: skip
        return f

    def positives(self, z1hat: Tensor, i0: int) -> None:
        if self._fuses(z1hat):  # the tile that holds the positive knows it in full precision
            return
        n, D = z1hat.shape
        z2 = self.p.z2
        self.kernels.positives(
            self.problem, self.code, z1hat.data_ptr(), z1hat.stride(0), z2.data_ptr(), z2.stride(0), D, i0, n,
            self.queue,
        )  # fmt: skip


@functools.cache
def _runs(kernels: Any, device: int) -> bool:
    return kernels.small_runs((device, 0))


def fits(p: Contrastive) -> bool:
    """Whether the one launch is taken, where the device can hold a grid that waits for itself."""
    (B, D), N = p.z1.shape, p.z2.shape[0]
    work = B * N * D
    return not p.share.total and max(B, N) <= SMALL_ROWS and work <= SMALL.get(p.z1.dtype, 0)


def small(p: Contrastive, k: Norms) -> Result:
    """Forward and backward in one launch."""
    (B, D), N = p.z1.shape, p.z2.shape[0]
    needs = p.needs
    new = lambda *shape: torch.empty(shape, dtype=p.acc, device=p.z1.device)  # noqa: E731
    rows, total, numbers, coef = new(B), new(), Numbers.of(p), p.row_coefficients()
    dz1 = k.empty(B, D, dtype=p.z1.dtype) if needs.z1 else None
    dz2 = k.empty(N, D, dtype=p.z1.dtype) if needs.z2 else None
    dlogit = new(GRADIENTS, B) if p.trained else None
    size = k.kernels.small_work_size(B, N, D, k.code, p.normalize, p.symmetric, needs.z1, needs.z2)
    work = k.empty(size, dtype=torch.uint8)
    problem = _problem(k.kernels, p, numbers, coef, loss=rows, dlogit=dlogit)
    k.kernels.small(
        problem, k.code, p.z1.data_ptr(), p.z1.stride(0), p.z2.data_ptr(), p.z2.stride(0), D, p.normalize, p.symmetric,
        needs.z1 or needs.z2 or p.trained, work.data_ptr(), pointer(dz1), pointer(dz2), total.data_ptr(), k.queue,
    )  # fmt: skip
    return p.result(rows, dz1, dz2, dlogit, loss=total)


def contrastive(p: Contrastive) -> Result:
    if fits(p):
        k = Norms(p.z1, p.z2.shape[0])
        if _runs(k.kernels, k.queue[0]):
            return small(p, k)
    return panel.contrastive(p, Kernels)
