"""How tensors are named to native code, which knows no torch: an address and a code for the dtype."""

from __future__ import annotations

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # DType in kernels/common/problem.h
GROUPINGS = {"mass": 1, "size": 2, "span": 3}  # GroupKind in kernels/common/groups.h
DIVERGENCES = {"ce": 0, "kl": 1, "js": 2}  # Divergence in kernels/common/problem.h


def pointer(t: Tensor | float | None) -> int:
    """A tensor's address; 0 (null) for a number or None."""
    return t.data_ptr() if isinstance(t, Tensor) else 0
