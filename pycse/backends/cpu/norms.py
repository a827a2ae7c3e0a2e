"""Memory, normalisation and its gradient through kernels/cpu/norms.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.backends.addresses import CODES, pointer
from pycse.kernels import native
from pycse.panels import norms

HUGE = 4 << 20  # bytes from which memory is asked for in huge pages (kernels/cpu/pages.h)


class Norms(norms.Norms):
    def __init__(self, z: Tensor) -> None:
        self.native, self.threads, self.code, self.device = native(), torch.get_num_threads(), CODES[z.dtype], z.device

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        t = torch.empty(shape, dtype=dtype, device=self.device)
        if t.nbytes >= HUGE:
            self.native.prefer_huge_pages(t.data_ptr(), t.nbytes)
        return t

    def normalize(self, z: Tensor, r: Tensor | None, out: Tensor | None, factor: float = 1.0) -> bool:
        ld = 0 if out is None else out.stride(0)
        return self.native.normalize(
            CODES[z.dtype], z.data_ptr(), z.stride(0), *z.shape, pointer(r), pointer(out), ld, factor, self.threads
        )

    def project(
        self, z: Tensor, g: Tensor, r: Tensor, out: Tensor, f: Tensor | None = None, scaled: bool = False
    ) -> None:
        self.native.project(
            self.code,
            CODES[g.dtype],
            z.data_ptr(),
            z.stride(0),
            g.data_ptr(),
            0 if g.is_contiguous() else g.stride(1),
            *z.shape,
            r.data_ptr(),
            pointer(f),
            scaled,
            out.data_ptr(),
            self.threads,
        )
