"""Runs what `make sanitize` has built: the native checks in every instruction set of this processor, then tests of the
Python module. Prints the seconds of each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# Fresh memory is 0xff: NaN to whoever reads what nobody wrote. Python and PyTorch keep memory until the process ends.
ADDRESS = "malloc_fill_byte=255:max_malloc_fill_size=1073741824:detect_leaks=0:strict_string_checks=1"
COMPILER = os.environ.get("CXX", "c++")
CHECKS = "tests/kernels/native/checks"
TESTS = ["backends/test_uniformity.py", "sparse/test_sparse_kernels.py", "backends/cuda/test_cuda_small.py"]
OTHERS = "not every_instruction_set"  # processes of their own, which do not have the plugin
GARBAGE = "import sanitized, garbage; garbage.main()"
WHICH = ("native", "emulated")


def run(what: str, command: list[str], **variables: str) -> None:
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_WAIT_POLICY": "passive", **variables})
    print(f"{time.monotonic() - start:6.1f} s  {what}", flush=True)
    if done.returncode:
        sys.exit(f"{what}: status {done.returncode}")


def main(built: Path) -> None:
    names = subprocess.run([built / "address" / CHECKS, "--list"], check=True, capture_output=True, text=True)
    sets = names.stdout.split()
    for isa in sets:
        run(f"address {isa}", [str(built / "address" / CHECKS)], PYCSE_CPU_ISA=isa, ASAN_OPTIONS=ADDRESS)
    for isa in sets:
        run(f"threads {isa}", [str(built / "thread" / CHECKS)], PYCSE_CPU_ISA=isa)
    # Python is linked with neither library, and AddressSanitizer looks for the other's exceptions when it starts.
    libraries = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    variables = {
        "PYTHONPATH": os.pathsep.join(str(ROOT / "tests" / name) for name in ("kernels/native", "helpers")),
        "PYCSE_EMULATED": str(next((built / "address").glob("_emulated*.so")).resolve()),
        "PYCSE_SANITIZED": str(next((built / "address").glob("_native*.so")).resolve()),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": ADDRESS,
    }
    for which in WHICH:
        run(f"address, garbage, {which}", [sys.executable, "-c", GARBAGE, os.devnull, "20", which], **variables)
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "sanitized",
        "-k",
        OTHERS,
        *(f"tests/{name}" for name in TESTS),
    ]
    run("address, the module's tests", tests, **variables)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
