"""Code in a process of its own that is told to use one of the CPU kernels' instruction sets (PYCSE_CPU_ISA)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pycse.kernels import native

each = pytest.mark.parametrize("isa", ["portable", "v3", "v4", "amx"])


def run_with(isa: str, folder: Path, code: str) -> None:
    """Runs the code in ``folder``; it finds the modules that this process finds. Raises where the code does."""
    if isa not in native().cpu_instruction_sets():
        pytest.skip(f"this processor runs {', '.join(native().cpu_instruction_sets())}, not {isa}")
    before = "import sys\nfrom pycse.kernels import native\nassert native().cpu_isa() == sys.argv[1]\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{before}{code}\nprint('to the end')", isa],
        env={**os.environ, "PYCSE_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("to the end\n")
