"""Launches the kernels of kernels/triton/prefixes.py for the driver of losses at several lengths."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from pycse.backends.triton.norms import Norms, block_of, on_device_of, warps_of
from pycse.kernels.triton import prefixes as kernels
from pycse.panels import prefixes as panel
from pycse.problem import Contrastive

OF_A_LENGTH = 6  # coefficients, the first of pycse.logits.Coefficients; an own negative's are alike at all lengths
ROWS, COLUMNS = 64, 64  # of a program that makes gradients: its columns' sums are stored once for so many rows


@functools.lru_cache(64)
def on_device(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that calls have in common: copied once, so that a CUDA graph holds no copy from the host."""
    return torch.tensor(values, dtype=dtype, device=device)


class Kernels(Norms, panel.Kernels):
    most = 16  # lengths of a tile: with 32 keys a row's sums stay in registers

    def __init__(self, problems: list[Contrastive], states: panel.States) -> None:
        first = problems[0]
        super().__init__(first.z1)
        self.p, self.states, self.K, self.N = first, states, len(problems), first.z2.shape[0]
        self.coef = self.number(states.coef, first.B)
        self.numbers = self._numbers(problems, states.weights)
        form = first.logit
        own_b, own_c = form.own
        self.own_b = self.number(own_b) if own_b else None
        self.own_c = self.number(own_c) if form.has_own else None
        self.linear = form.linear
        shifts = [p.shift for p in problems]
        self.shift = None
        if None not in shifts:
            self.shift = on_device(tuple(x / math.log(2) for x in shifts if x is not None), first.acc, self.device)
        self.exclude: float | Tensor | None = None
        if first.exclude_each is not None:
            self.exclude = first.exclude_each.to(first.acc).contiguous()
        elif first.exclude_above is not None:
            self.exclude = self.number(first.exclude_above, first.B)
        self.guide_above = self.number(first.guide_above, first.B) if first.guided else None
        self.lengths = triton.next_power_of_2(self.K)
        self.block = max(32, block_of(self.N) // self.lengths)

    @staticmethod
    def place(z: Tensor) -> Any:
        return on_device_of(z)

    def _numbers(self, problems: list[Contrastive], weights: list[float]) -> Tensor:
        """(7, K): coefficients and weights of the lengths."""
        acc, device = problems[0].acc, self.device
        of: list[Any] = [p.coefficients() for p in problems]
        if isinstance(of[0], Tensor):
            return torch.cat([torch.stack(of, 1)[:OF_A_LENGTH], on_device((tuple(weights),), acc, device)])
        return on_device((*tuple(zip(*of))[:OF_A_LENGTH], tuple(weights)), acc, device)

    def visit(
        self, S: Tensor, rho: Tensor, i0: int, t: Tensor | None, columns: Tensor | None, T: Tensor | None
    ) -> None:
        p, out, (K, c, N) = self.p, self.states, S.shape
        results = None if t is None else self.new(5, K, c)
        sizes = (i0, c, p.B, N, K, S.stride(0), S.stride(1), 0 if T is None else T.stride(0))
        options: dict[str, Any] = dict(
            LINEAR=self.linear, EXCLUDE_BY=p.exclude_by, GUIDE_BY=p.guide_by, LENGTHS=self.lengths
        )
        kernels.sums[(c,)](
            S, rho, out.r2, out.s_pos, p.positives, p.query_ids, p.key_ids, self.exclude, T, self.guide_above,
            self.coef, self.numbers, out.loss, out.dlogit if results is not None else None, results, self.own_b,
            self.own_c, self.shift, *sizes, **options, BLOCK=self.block, num_warps=warps_of(self.lengths * self.block),
        )  # fmt: skip
        if results is None or t is None or columns is None:
            return
        chunks = triton.cdiv(c, ROWS)
        partial = self.new(chunks, K, N)
        kernels.gradients[(triton.cdiv(N, COLUMNS), chunks)](
            S, rho, out.r2, results, p.positives, p.query_ids, p.key_ids, self.exclude, T, self.guide_above,
            self.numbers, partial, self.own_b, self.own_c, *sizes, **options, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        t.copy_(results[4])
        columns += partial.sum(0)
