"""Rows that processes share, by the Triton backend: on a CUDA GPU where there is one, and in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed: pip install 'pycse-kernels[triton]'")

import shares
from interpreter import INTERPRETED, run_interpreted


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_in_the_interpreter():
    run_interpreted(__file__, len(shares.NAMES))


@pytest.mark.parametrize("name", shares.NAMES)
def test_shares_add_up(name, device):
    shares.check(name, "triton", torch.float32, device)


def test_uniformity_adds_up(device):
    shares.check_uniformity("triton", torch.float32, device)
