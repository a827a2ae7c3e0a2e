"""Compiled and Triton kernels of pycse. ``native()`` is the C++/CUDA module; nothing is loaded before it is asked
for."""

from __future__ import annotations

from types import ModuleType
from typing import Any

_module: ModuleType | None = None


def native() -> Any:
    """The compiled module. torch is imported first, so that both share torch's OpenMP runtime."""
    global _module
    if _module is None:
        import torch  # noqa: F401
        from pycse.kernels import _native

        _module = _native
    return _module
