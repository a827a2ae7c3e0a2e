"""Triton's interpreter."""

from __future__ import annotations

import os


def interpreted() -> bool:
    """True where Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
