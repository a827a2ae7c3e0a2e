"""The CUDA kernels' bodies on the host, a module of the tests' own (tests/kernels/emulation): built here once for the
sources as they are, and put behind backend="cpu"."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pycse.ops import fused

from oracle import Case

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulated" / str(sysconfig.get_config_var("SOABI"))
NAME = "_emulated"
SOURCES = (
    "CMakeLists.txt",
    "kernels/common/*",
    "kernels/cuda/*.h",
    "kernels/cuda/bindings.cpp",
    "tests/kernels/emulation/*",
)


class Unavailable(RuntimeError):
    """This machine cannot build the module."""


def _fingerprint() -> str:
    made = hashlib.sha256(os.environ.get("CXX", "").encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            made.update(path.name.encode() + path.read_bytes())
    return made.hexdigest()


def _program(name: str) -> str:
    """The environment's own before another one."""
    folders = (str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise Unavailable(f"no {name}: pip install -e '.[test]'")
    return found


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _compile() -> None:
    """A machine without the means is no fault of the sources; what does not compile is."""
    cmake, ninja = _program("cmake"), _program("ninja")
    try:
        import pybind11
    except ImportError:
        raise Unavailable("no pybind11: pip install -e '.[test]'") from None
    made = _run(
        cmake, "--fresh", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DPYCSE_EMULATED=ON", "-DPYCSE_MODULE=OFF", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )  # fmt: skip
    if made.returncode:
        raise Unavailable(f"cmake says\n{made.stdout[-2000:]}")
    made = _run(cmake, "--build", str(BUILD), "--target", NAME)
    if made.returncode:
        raise RuntimeError(f"tests/kernels/emulation does not compile:\n{made.stdout[-8000:]}")


@functools.cache
def _built() -> Path | Unavailable:
    if given := os.environ.get("PYCSE_EMULATED"):
        return Path(given)
    path, stamp = BUILD / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}", BUILD / "sources"
    try:
        BUILD.mkdir(parents=True, exist_ok=True)
        with open(BUILD / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's other processes wait for the one that builds
            sources = _fingerprint()
            if not path.exists() or not stamp.exists() or stamp.read_text() != sources:
                stamp.unlink(missing_ok=True)
                _compile()
                stamp.write_text(sources)
    except Unavailable as problem:
        return problem
    except OSError as problem:
        return Unavailable(f"{BUILD} cannot be written: {problem}")
    return path


def built() -> Path:
    """The module's file, PYCSE_EMULATED's or one that is built now; skips the test where that cannot be."""
    path = _built()
    if isinstance(path, Unavailable):
        pytest.skip(f"the CUDA kernels' emulation cannot be built: {path}")
    return path


@functools.cache
def kernels() -> Any:
    """The module."""
    spec = importlib.util.spec_from_file_location(NAME, built())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def takes(case: Case) -> bool:
    """Whether backend="cuda" has the case's options."""
    return not any(name.startswith(("guide", "directions", "negatives")) for name in case.options)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """What a kernel does not write is NaN to the next."""
    memory = torch.empty(shape, dtype=dtype)
    memory.view(torch.uint8).fill_(0xFF)
    return memory


def instead(monkeypatch: pytest.MonkeyPatch, backend: ModuleType, name: str, emulate: Callable[..., Any]) -> None:
    """The backend's function of that name runs ``emulate``, which reads numbers through their addresses as a GPU
    would."""
    kernels()
    monkeypatch.setattr(backend, name, emulate)
    monkeypatch.setattr(fused, "number", lambda x: x.detach() if isinstance(x, Tensor) else x)
