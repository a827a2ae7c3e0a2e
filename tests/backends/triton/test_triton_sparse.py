"""The Triton backend's sparse products against the float64 reference.

As test_triton.py: on a CUDA GPU where there is one, and in any case once more in a process of its own with
TRITON_INTERPRET=1 on CPU tensors. That the kernels compile is tests/helpers/triton_compile.py's, which test_triton.py runs.
"""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed: pip install 'pycse-kernels[triton]'")

from interpreter import CUDA, INTERPRETED, run_interpreted

from pycse.pattern import Pattern, pack_mask

import sparse_products
from sparse_products import ALL, LARGE, SPLIT, Case

ours = importlib.import_module("pycse.backends.triton.sparse")

if CUDA:
    DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    TABLE = [(case, dtype) for dtype in DTYPES for case in ALL]
else:  # the interpreter's bfloat16 is no test, and a case takes it a third of a second
    TABLE = [(case, torch.float32) for case in ALL]
    TABLE += [(case, dtype) for dtype in (torch.float64, torch.float16) for case in ALL[1::4]]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_in_the_interpreter():
    run_interpreted(__file__, len(TABLE))


@pytest.mark.parametrize("case, dtype", TABLE, ids=str)
def test_table(case, dtype, device):
    sparse_products.check(case, ours, dtype, device)


@pytest.mark.parametrize("case", SPLIT[:3], ids=str)
def test_splits_of_the_tokens(case, device, monkeypatch):
    monkeypatch.setattr(ours, "splits_of", lambda *_: 5)
    sparse_products.check(case, ours, torch.float32, device)


def test_layers(device):
    sparse_products.check_layer("triton", device)


@pytest.mark.parametrize("in_", [1, 31, 33, 1100])
def test_bits_of_single_weights(in_, device):
    mask = torch.rand(4, in_, generator=torch.Generator().manual_seed(in_)).to(device) < 0.4
    mask[2], mask[3] = False, True
    assert torch.equal(ours.bits_of(Pattern.from_mask(mask)), pack_mask(mask))


@pytest.mark.parametrize("kind", ["16", "tf32"])
def test_tiles_of_tensor_cores(kind, device, monkeypatch):
    """With the interpreter's own float32: tiles of 128 tokens and steps of several blocks."""
    monkeypatch.setattr(ours, "kind_of", lambda dtype: kind if dtype == torch.float32 else ours.dot_kind(dtype))
    if CUDA and kind == "tf32":
        pytest.skip("tf32 on a GPU has its own budget: test_tf32")
    for case in (Case(129, 96, 160, 32, 0.5), Case(70, 48, 112, 16, 0.7), Case(130, 70, 150, 0, 0.5)):
        sparse_products.check(case, ours, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case, dtype, cuda):
    sparse_products.check(case, ours, dtype, cuda)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_tf32(case, cuda):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        actual = sparse_products.run(case, ours, torch.float32, cuda)
    finally:
        torch.set_float32_matmul_precision(before)
    truth = sparse_products.run(case, sparse_products.reference, torch.float32, "cpu", exact=True)
    for name, value in truth.items():
        assert (actual[name].double().cpu() - value).norm() <= 2e-3 * value.norm(), name


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_call_same_bits(case, cuda):
    sparse_products.check_repeat(case, ours)


@pytest.mark.parametrize("case", [LARGE[0], LARGE[3], LARGE[4]], ids=str)
@pytest.mark.clean_memory
def test_waits_for_nothing_and_is_captured(case, cuda):
    sparse_products.check_capture(case, ours)
