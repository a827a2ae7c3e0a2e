"""Which backend computes a call.

``reference`` materialises N x N and is the oracle. The others share the row-panel algorithm of pycse/panels: ``torch``
in plain PyTorch, ``cpu`` in C++, ``triton`` and ``cuda`` on NVIDIA GPUs. "auto" takes the best that runs for the
tensors' device; a named backend that cannot run raises, it never falls back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch as pytorch  # the name torch becomes this package's backend once that is imported

from pycse.backends import forks
from pycse.backends.interpreter import interpreted
from pycse.choices import BACKENDS

DIFFERENTIABLE = ("reference",)  # plain PyTorch: its own autograd, to any order
IN_PARTS = ("torch", "cpu", "triton")  # whose contrastive kernels run over negatives in parts: panels/parts.py
# For "auto", best first.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


@functools.cache
def native_problem() -> str | None:
    """Why the compiled module cannot be loaded; None if it can."""
    try:
        from pycse.kernels import native

        native()
    except ImportError as error:
        checkout = Path(__file__).resolve().parents[2]
        if (checkout / "setup.py").exists() and (checkout / "kernels" / "cpu").exists():
            return (
                f"its compiled kernels are not built in this checkout ({error}): run `pip install -e .` in it, "
                "or start Python in another folder to use an installed pycse"
            )
        return f"its compiled kernels cannot be loaded ({error}): reinstall pycse-kernels with a C++ compiler at hand"
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def unusable(name: str) -> str | None:
    """Why a backend cannot run on this machine at all; None if it can."""
    if name == "cpu":
        return native_problem()
    if name == "triton":
        if not _installed("triton"):
            return "triton is not installed: pip install 'pycse-kernels[triton]'"
        if not pytorch.cuda.is_available() and not interpreted():
            return "no NVIDIA GPU is available to PyTorch (TRITON_INTERPRET=1 interprets the kernels on the CPU)"
    if name == "cuda":
        if native_problem() is not None:
            return native_problem()
        from pycse.kernels import native

        if not native().cuda_compiled():
            return "pycse was built without CUDA: install with nvcc on PATH and PYCSE_CUDA=1"
        if not pytorch.cuda.is_available():
            return "no NVIDIA GPU is available to PyTorch"
    return None


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def wrong_device(name: str, device: str) -> str | None:
    """Why a usable backend cannot take tensors on this device."""
    if name == "cpu" and device != "cpu":
        return f"it takes CPU tensors, and the input is on {device}"
    if name in ("triton", "cuda") and device != "cuda" and not (name == "triton" and interpreted()):
        return f"it takes CUDA tensors, and the input is on {device}"
    return None


@functools.cache
def lacks(name: str, op: str) -> str | None:
    """Why a backend has no module for an op; None if it has one."""
    if importlib.util.find_spec(f"pycse.backends.{name}.{op}") is not None:
        return None
    having = [x for x in BACKENDS if importlib.util.find_spec(f"pycse.backends.{x}.{op}") is not None]
    return f"it has no kernels for the op {op!r}; {', '.join(having)} have"


@functools.cache
def _auto(device: str, op: str) -> str:
    reasons = []
    for name in PREFERENCE.get(device, ()):
        problem = unusable(name) or lacks(name, op)
        if problem is None:
            return name
        reasons.append(f"{name}: {problem}")
    why = "; ".join(reasons) or f"no kernels are written for {device} tensors"
    warnings.warn(
        f"pycse uses its slower 'torch' backend for {device} tensors ({why}). "
        "Pass backend='torch' to choose it without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )
    return "torch"


def module(name: str, device: str, op: str) -> Any:
    """The module that implements ``op`` in the backend asked for. Raises RuntimeError where it cannot run."""
    found = _module(name, device, op)
    if device == "cpu" and not pytorch.compiler.is_compiling():
        forks.check(name == "cpu" or (name == "auto" and found.__name__.startswith("pycse.backends.cpu.")))
    return found


@functools.cache
def _module(name: str, device: str, op: str) -> Any:
    if name == "auto":
        name = _auto(device, op)
    problem = lacks(name, op) or unusable(name) or wrong_device(name, device)
    if problem is not None:
        raise RuntimeError(f"backend={name!r} cannot run here: {problem}")
    return importlib.import_module(f"pycse.backends.{name}.{op}")
