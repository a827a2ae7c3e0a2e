from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import CUDA, INTERPRETED

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Every torch.empty comes filled with NaN, so that a result nobody wrote is seen."""
    if "clean_memory" in request.keywords:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure(config):
    config.addinivalue_line("markers", "clean_memory: leave torch.empty as it is (memory and compiler tests)")


@pytest.fixture
def golden_folder() -> Path:
    if not GOLDEN.exists():
        pytest.skip("the authors' golden vectors are not beside this checkout (tests/golden holds our own)")
    return GOLDEN


@pytest.fixture
def device() -> str:
    """Of the Triton tests."""
    if INTERPRETED:
        return "cpu"
    if not CUDA:
        pytest.skip("no CUDA GPU; test_everything_in_the_interpreter runs this file without one")
    return "cuda"


@pytest.fixture
def cuda() -> str:
    if not CUDA:
        pytest.skip("needs a CUDA GPU")
    return "cuda"
