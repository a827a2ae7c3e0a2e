"""The CUDA kernels of kernels/cuda around PyTorch's GEMMs. Nothing here waits for the device, so calls can be captured in
a CUDA graph; numbers in tensors are read by the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.backends.addresses import pointer
from pycse.backends.cuda.norms import Norms
from pycse.panels import contrastive as panel
from pycse.problem import Contrastive, Result


class Kernels(Norms, panel.Kernels):
    def __init__(self, p: Contrastive, state: panel.State) -> None:
        B, N = p.z1.shape[0], p.z2.shape[0]
        super().__init__(p.z1, N)
        self.p, self.state = p, state
        self.kept = [t.to(p.acc) if isinstance(t, Tensor) else t for t in (p.temperature, p.m)]  # alive for the kernels
        (tau, tau_at), (m, m_at) = ((0.0, n.data_ptr()) if isinstance(n, Tensor) else (n, 0) for n in self.kept)
        coef = state.coef
        self.problem = self.kernels.Contrastive(
            B=B,
            N=N,
            focal=p.focal,
            tau=tau,
            tau_at=tau_at,
            m=m,
            m_at=m_at,
            shift=p.shift,
            hard_weight=p.hard_negative_weight,
            exclude_above=p.exclude_above,
            r2=state.r2.data_ptr(),
            s_pos=pointer(state.s_pos),
            positives=pointer(p.positives),
            query_ids=pointer(p.query_ids),
            key_ids=pointer(p.key_ids),
            coef=pointer(coef),
            coef_all=1.0 if isinstance(coef, Tensor) else coef,
            loss=state.loss.data_ptr(),
            dtau=pointer(state.dtau),
            dm=pointer(state.dm),
        )
        if (s := state.sums) is not None:
            self.problem.symmetric_state(
                lpos=s.lpos.data_ptr(),
                lneg=s.lneg.data_ptr(),
                column_max=s.column_max.data_ptr(),
                column_sum=s.column_sum.data_ptr(),
                lneg_column=s.lneg_column.data_ptr(),
                lse_column=s.lse_column.data_ptr(),
            )

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

    def positives(self, z1hat: Tensor, i0: int) -> None:
        n, D = z1hat.shape
        z2 = self.p.z2
        self.kernels.positives(
            self.problem, self.code, z1hat.data_ptr(), z1hat.stride(0), z2.data_ptr(), z2.stride(0), D, i0, n, self.queue,
        )  # fmt: skip


def contrastive(p: Contrastive) -> Result:
    return panel.contrastive(p, Kernels)
