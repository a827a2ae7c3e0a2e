"""Launches kernels/triton/{groups,distill}.py for the panel driver, with PyTorch's sorts between. Nothing waits for the
device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pycse import grouping
from pycse.backends.triton.norms import Norms, block_of, on_device_of, warps_of
from pycse.kernels.triton import distill as row_kernels
from pycse.kernels.triton import groups
from pycse.panels import distill as panel
from pycse.problem import Distillation, Result

# Entries of a panel that are ranked and shuffled at a time: about 60 bytes each while they are sorted, 250 MB.
RANKED = 1 << 22

FLAT = 1024  # entries of a program that knows no rows


def others(T: Tensor, i0: int, dtype: torch.dtype) -> Tensor:
    """(c, B - 1): the columns but the diagonal."""
    c, B = T.shape
    row = torch.arange(i0, i0 + c, dtype=torch.int64, device=T.device)[:, None]
    return torch.where(torch.arange(B - 1, dtype=torch.int64, device=T.device) < row, T[:, :-1], T[:, 1:]).to(dtype)


class Kernels(Norms, panel.Kernels):
    def __init__(self, d: Distillation, state: panel.State) -> None:
        super().__init__(d.z1)
        self.d, self.state = d, state
        self.B = d.B
        self.coef = self.number(state.coef, self.B)  # row by row where it is a tensor
        self.inv_student = self.number(1 / d.student_temperature)
        self.inv_teacher = self.number(1 / d.teacher_temperature)
        self.block, self.steps = block_of(self.B), (self.B - 1).bit_length()
        cut = d.cut
        if cut is not None and cut.kind == "mass":
            self.group_temperature = self.number(d.group_temperature)
            self.last = grouping.group_count(cut.value) - 1
            self.P = torch.full((), cut.value, dtype=torch.float64, device=self.device)

    def _group(self, ranked: Tensor, order: Tensor | None) -> Tensor:
        """Groups by column, or by rank without ``order``."""
        cut = self.d.cut
        assert cut is not None
        mass = cut.kind == "mass"
        group = torch.empty(ranked.shape, dtype=torch.int32, device=self.device)
        groups.cut[(ranked.shape[0],)](
            ranked, order, group, self.group_temperature if mass else None, self.P if mass else None,
            *self._span, self.last if mass else 0, self.B - 1,
            KIND=cut.kind, BLOCK=self.block, num_warps=warps_of(self.block),
        )  # fmt: skip
        return group

    @property
    def _span(self) -> tuple[int, int]:
        """Ranks of a span, or the size of a group, which may exceed any rank; unused for mass."""
        cut = self.d.cut
        assert cut is not None
        return (0, 0) if cut.kind == "mass" else (int(min(cut.value, self.B)), cut.end)

    def sources(self, T: Tensor, i0: int) -> Tensor:
        """(c, B - 1), both without the diagonal: the column whose q each column receives."""
        c, n = T.shape[0], self.B - 1
        ranked, order = others(T, i0, self.acc).sort(dim=1, descending=True, stable=True)
        group, by_group = self._group(ranked, order).sort(dim=1, stable=True)
        del ranked, order
        key = torch.empty((c, n), dtype=torch.int64, device=self.device)
        flat = (triton.cdiv(c * n, FLAT),)
        groups.keys[flat](group, key, self.d.seed, i0, c, n, self.steps, BLOCK=FLAT, num_warps=4)
        by_key = key.sort(dim=1, stable=True).indices
        source = torch.empty((c, n), dtype=torch.int32, device=self.device)
        groups.replay[flat](by_group, by_key, source, c, n, BLOCK=FLAT, num_warps=4)
        return source

    def means(self, T: Tensor, i0: int) -> Tensor:
        """(c, B - 1), without the diagonal: exp((t - max t) / tau_t) averaged over groups."""
        cut, c, n = self.d.cut, T.shape[0], self.B - 1
        assert cut is not None
        ranked, order = others(T, i0, self.acc).sort(dim=1, descending=True, stable=True)
        level = self._group(ranked, None) if cut.kind == "mass" else None
        tail = torch.empty((c, n), dtype=torch.float64, device=self.device)
        groups.tails[(c,)](ranked, tail, self.inv_teacher, n, BLOCK=self.block, num_warps=warps_of(self.block))
        mean = self.new(c, n)
        groups.means[(triton.cdiv(c * n, FLAT),)](
            ranked, order, level, tail, mean, self.inv_teacher, *self._span, c, n, self.steps,
            KIND=cut.kind, BLOCK=FLAT, num_warps=4,
        )  # fmt: skip
        return mean

    def rows(self, S: Tensor, T: Tensor, i0: int, grad: bool) -> None:
        if self.d.cut is None:
            return self._rows(S, T, i0, grad, None, None)
        step = max(1, RANKED // self.B)
        for a in range(0, S.shape[0], step):
            s, t, i = S[a : a + step], T[a : a + step], i0 + a
            if self.d.shuffle == "expected":
                self._rows(s, t, i, grad, None, self.means(t, i))
            else:
                self._rows(s, t, i, grad, self.sources(t, i), None)

    def _rows(self, S: Tensor, T: Tensor, i0: int, grad: bool, source: Tensor | None, mean: Tensor | None) -> None:
        row_kernels.rows[(S.shape[0],)](
            S, T, source, mean, self.coef, self.state.loss, self.inv_student, self.inv_teacher, i0, self.B,
            S.stride(0), T.stride(0),
            DIVERGENCE=self.d.divergence, GRAD=grad, BLOCK=self.block, num_warps=warps_of(self.block),
        )  # fmt: skip


def distill(d: Distillation) -> Result:
    with on_device_of(d.z1):
        return panel.distill(d, Kernels)
