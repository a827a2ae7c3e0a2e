"""Compiled and Triton kernels of pycse. ``native()`` is the C++/CUDA module; nothing is loaded before it is asked
for."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

_module: ModuleType | None = None


def _share_openmp(libraries: Path) -> None:
    """Put torch's OpenMP runtime where the module's symbols are looked up: it names none itself (CMakeLists.txt).

    torch's wheels do that themselves, under whatever name they carry it; a torch that was built otherwise may not.
    """
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    own = sorted(libraries.glob("libgomp*.so*"))
    with suppress(OSError):  # a module that was built without OpenMP, or with another, needs none
        ctypes.CDLL(str(own[0]) if own else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def native() -> Any:
    """The compiled module. torch is imported first, so that both share torch's OpenMP runtime."""
    global _module
    if _module is None:
        import torch

        if sys.platform == "linux":
            _share_openmp(Path(torch.__file__).parent / "lib")
        from pycse.kernels import _native

        _module = _native
    return _module
