"""``pycse.info()``: versions, and which backends run here or why not."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from pycse import backends
from pycse.choices import BACKENDS


@dataclass(frozen=True)
class Info:
    """What ``pycse.info()`` found. ``str()`` is a table; ``backends`` maps each name to "usable" or why it is not."""

    versions: dict[str, str]
    hardware: dict[str, str]
    backends: dict[str, str]
    auto: dict[str, str]

    def __str__(self) -> str:
        rows = [*self.versions.items(), *self.hardware.items()]
        rows += [(f"backend {name}", state) for name, state in self.backends.items()]
        rows += [(f"auto on {device}", name) for device, name in self.auto.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> Info:
    """Versions of pycse and what it runs on, and for each backend "usable" or the reason it is not.

    Returns:
        An :class:`Info`; print it for a table.
    """
    states = {name: backends.unusable(name) or "usable" for name in BACKENDS}
    hardware = {"CPU": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    if states["cpu"] == "usable":
        from pycse.kernels import native

        hardware["CPU"] += f", kernels for {native().cpu_isa()} (of {', '.join(native().cpu_instruction_sets())})"
        if not native().OPENMP:
            hardware["CPU"] += ", on one thread: the compiler had no OpenMP"
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    hardware["GPU"] = ", ".join(gpus) or "none"
    auto = {
        device: next((name for name in names if states[name] == "usable"), "torch")
        for device, names in backends.PREFERENCE.items()
        if device == "cpu" or gpus
    }
    versions = {
        "pycse-kernels": _version("pycse-kernels"),
        "Python": platform.python_version(),
        "torch": torch.__version__ + (f" (CUDA {torch.version.cuda})" if torch.version.cuda else ""),
        "triton": _version("triton"),
    }
    return Info(versions, hardware, states, auto)
