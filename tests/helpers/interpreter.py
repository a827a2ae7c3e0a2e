"""Where the Triton tests run: on a CUDA GPU, or in a process of their own in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from pycse import backends

INTERPRETED = backends.interpreted()
CUDA = torch.cuda.is_available() and not INTERPRETED


def in_another_process(*command: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **env},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def run_interpreted(file: str, more_than: int) -> None:
    """Every test of the file again, of which more than so many must pass."""
    release = lambda name: tuple(map(int, version(name).split(".")[:2]))  # noqa: E731
    if release("triton") <= (3, 6) and release("numpy") >= (2, 4):
        pytest.skip(f"the interpreter of triton {version('triton')} does not run with numpy {version('numpy')}")
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning")
    text = in_another_process("-m", "pytest", *options, file, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert int(text.split(" passed")[0].split()[-1]) > more_than, text
