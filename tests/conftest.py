from __future__ import annotations

import os
from pathlib import Path

# Processes of pytest-xdist share the cores; threads beyond them would wait for each other. Before torch reads it.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))

import pytest
import torch
from interpreter import CUDA, INTERPRETED

from pycse import backends

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
    config.addinivalue_line("markers", "gpu: runs on a GPU where there is one (set by the fixtures a test takes)")


def pytest_collection_modifyitems(items):
    for item in items:
        if {"device", "cuda", "cuda_backend"} & set(item.fixturenames):
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def device_alive():
    """A fault on the GPU takes its context with it, and with that every later test of the process: xdist starts
    another."""
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(70)
            raise


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


@pytest.fixture
def cuda_backend() -> str:
    problem = backends.unusable("cuda")
    if problem is not None:
        pytest.skip(f"backend='cuda' cannot run here: {problem}")
    return "cuda"
