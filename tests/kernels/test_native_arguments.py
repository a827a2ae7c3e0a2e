"""The compiled module refuses what shows in its arguments: sizes, strides, codes, null addresses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch
from pycse.kernels import native

pytest.importorskip("hypothesis", reason="draws the garbage")


@pytest.mark.parametrize("which, least", [("native", 18), ("emulated", 12)])
def test_garbage_is_refused_by_name_and_before_any_work(which, least, tmp_path):
    log = tmp_path / "last call"
    variables = {"PYTHONPATH": str(Path(emulation.__file__).parent)}
    variables["OMP_WAIT_POLICY"] = "passive"  # see test_native_memory.py
    if which == "emulated":
        variables["PYCSE_EMULATED"] = str(emulation.built())
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "native" / "garbage.py"), str(log), "60", which],
        env={**os.environ, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    last = log.read_text().strip() if log.exists() else "before the first call"
    assert done.returncode == 0, f"status {done.returncode} at {last}\n{done.stdout}{done.stderr}"
    refused, functions = (int(word.split()[0]) for word in done.stdout.split(","))
    assert functions >= least and refused > 40 * functions


def test_an_error_says_what_was_given_and_what_is_allowed():
    z, r = torch.zeros(3, 4, dtype=torch.float32, device="cpu"), torch.zeros(3, dtype=torch.float32, device="cpu")
    normalize = native().normalize
    with pytest.raises(ValueError, match="threads must lie between 1 and 4096, got 0"):
        normalize(0, z.data_ptr(), 4, 3, 4, r.data_ptr(), 0, 0, 1.0, 0)
    with pytest.raises(ValueError, match="dtype must lie between 0 and 2, got 3"):
        normalize(3, z.data_ptr(), 4, 3, 4, r.data_ptr(), 0, 0, 1.0, 1)
    with pytest.raises(ValueError, match="z must not be null"):
        normalize(0, 0, 4, 3, 4, r.data_ptr(), 0, 0, 1.0, 1)
    with pytest.raises(ValueError, match="out must have rows at least 4 apart, got 3"):
        normalize(0, z.data_ptr(), 4, 3, 4, r.data_ptr(), z.data_ptr(), 3, 1.0, 1)


def test_an_empty_matrix_and_a_repeated_row_are_no_mistakes():
    z, r = torch.ones(1, 4, dtype=torch.float32, device="cpu"), torch.zeros(3, dtype=torch.float32, device="cpu")
    native().normalize(0, 0, 0, 0, 4, 0, 0, 0, 1.0, 1)
    native().normalize(0, z.data_ptr(), 0, 3, 4, r.data_ptr(), 0, 0, 1.0, 2)
    assert r.tolist() == [0.5, 0.5, 0.5]
