"""The CUDA kernels' bodies on the host, behind backend="cpu"."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pycse.ops import fused


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """What a kernel does not write is NaN to the next."""
    memory = torch.empty(shape, dtype=dtype)
    memory.view(torch.uint8).fill_(0xFF)
    return memory


def instead(monkeypatch: pytest.MonkeyPatch, backend: ModuleType, name: str, emulate: Callable[..., Any]) -> None:
    """The backend's function of that name runs ``emulate``, which reads numbers through their addresses as a GPU
    would."""
    monkeypatch.setattr(backend, name, emulate)
    monkeypatch.setattr(fused, "value", lambda tensor, value: value if tensor is None else tensor.detach())
