"""Normalisation and its gradient in plain PyTorch, formulas as in kernels/cpu/norms.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.panels import norms


class Norms(norms.Norms):
    def __init__(self, z: Tensor) -> None:
        self.device, self.acc = z.device, torch.promote_types(z.dtype, torch.float32)

    def normalize(self, z: Tensor, r: Tensor | None, out: Tensor | None, factor: float = 1.0) -> bool | None:
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        top = wide.abs().amax(1, keepdim=True)
        scaled = wide / torch.where(top > 0, top, 1)  # the square, and the norm itself, may leave the type's range
        length = scaled.norm(dim=1, keepdim=True)
        tiny = length * top <= 1e-12
        if r is not None:
            r.copy_(torch.where(tiny, 0, 1 / top / length).squeeze(1))
        if out is not None:
            out.copy_(torch.where(tiny, 0, scaled / length * factor))
        return bool((length * top > 1e12).any()) if z.device.type == "cpu" else None

    def project(
        self, z: Tensor, g: Tensor, r: Tensor, out: Tensor, f: Tensor | None = None, scaled: bool = False
    ) -> None:
        r = r[:, None]
        unit = z.to(self.acc) * r
        wide = g.to(self.acc)
        wide = wide - unit * (unit * wide).sum(1, keepdim=True)
        if f is not None:
            wide = wide * f[:, None]
        out.copy_(wide * ((r != 0) if scaled else r))
