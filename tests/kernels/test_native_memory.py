"""Every allocation of a call fails once: inputs and gradients stay as they were, the next call is right."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent / "native"


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    """native/failing.cpp, compiled here."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler, and Linux: native/failing.cpp is compiled and preloaded")
    out = tmp_path_factory.mktemp("shim") / "failing.so"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", str(NATIVE / "failing.cpp"), "-o", str(out), "-ldl"],
        check=True,
    )
    return out


def test_no_failed_allocation_ends_the_process_or_changes_a_value(shim, tmp_path):
    done = subprocess.run(
        [sys.executable, str(NATIVE / "failing_calls.py"), str(shim)],
        # passive: on a busy machine, threads that spin at barriers take the others' time
        env={**os.environ, "LD_PRELOAD": str(shim), "OMP_WAIT_POLICY": "passive"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    failures = int(done.stdout.split()[0])
    assert failures > 300, f"only {failures} allocations failed: is the shim still where PyTorch and pycse allocate?"
