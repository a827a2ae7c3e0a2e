"""The C++ row kernel of kernels/cpu/supervised.h around the products of products.py; the keys of each class are listed
once, so that no id is compared in the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.backends.addresses import pointer
from pycse.backends.cpu.products import Products
from pycse.kernels import native
from pycse.panels import contrastive as panel
from pycse.problem import Result, Supervised


def classes(ids1: Tensor, ids2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys by class, ascending: class k has keys[ptr[k] : ptr[k + 1]], the last class none; and the rows' classes.
    All int64."""
    ids, keys = ids2.sort(stable=True)
    found, counts = ids.unique_consecutive(return_counts=True)
    ptr = torch.zeros(found.shape[0] + 2, dtype=torch.int64, device=ids.device)
    torch.cumsum(counts, 0, out=ptr[1:-1])
    ptr[-1] = ptr[-2]
    of_rows = torch.searchsorted(found, ids1)
    known = found[of_rows.clamp(max=found.shape[0] - 1)] == ids1
    return ptr, keys, torch.where(known, of_rows, found.shape[0])


class Kernels(Products, panel.Kernels):
    p: Supervised

    def __init__(self, p: Supervised, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        self.lists = classes(p.ids1, p.key_ids)  # alive for the kernels
        ptr, keys, of_rows = self.lists
        self.problem = native().Supervised(
            B=p.B,
            N=state.r2.shape[0],
            b=p.sharpness(),
            shift=p.shift,
            same=p.same,
            inside=p.inside,
            ptr=ptr.data_ptr(),
            keys=keys.data_ptr(),
            classes=of_rows.data_ptr(),
            class_count=ptr.shape[0] - 1,
            r2=state.r2.data_ptr(),
            coef=pointer(state.coef),
            coef_all=1.0 if isinstance(state.coef, Tensor) else state.coef,
            loss=state.loss.data_ptr(),
            dlogit=pointer(state.dlogit),
        )

    def rows(self, S: Tensor, i0: int, grad: bool) -> Tensor | None:
        f = torch.empty(S.shape[0], dtype=self.p.acc, device=S.device) if grad else None
        self.native.supervised(
            self.problem, self.code, S.data_ptr(), S.stride(0), i0, S.shape[0], pointer(f), self.threads, grad
        )
        return f


def supervised(p: Supervised) -> Result:
    return panel.contrastive(p, Kernels)
