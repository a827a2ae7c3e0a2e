"""What every panel driver asks of a backend besides its row kernels: memory, normalisation and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


class Norms:
    device: torch.device

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory for a panel or a gradient."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def normalize(self, z: Tensor, r: Tensor | None, out: Tensor | None, factor: float = 1.0) -> bool | None:
        """r = 1/|z| (0 for a zero vector) and out = factor r z, whose rows may be strided.

        On a CPU: whether a row is longer than 1e12, whose products may overflow. A GPU would have to be waited for.
        """
        raise NotImplementedError

    def project(
        self, z: Tensor, g: Tensor, r: Tensor, out: Tensor, f: Tensor | None = None, scaled: bool = False
    ) -> None:
        """dL/dz from f g = dL/dzhat (or from g = r dL/dzhat, where g is ``scaled`` already)."""
        raise NotImplementedError
