"""The CUDA backend's sparse products. Its kernels run everywhere, thread by thread on the host (kernels/cuda/tile.h),
matrix instructions by the layouts of the PTX manual, and are held to the float64 reference; with a GPU the table runs
on the device. That the compiled kernels do not spill is test_cuda.py's."""

from __future__ import annotations

import types

import emulation
import pytest
import torch

from pycse.backends.cpu import sparse as cpu
from pycse.backends.cuda import sparse as cuda
from pycse.pattern import Pattern, pack_mask

import sparse_products
from sparse_products import ALL, LARGE, SPLIT

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Emulated(cuda.Kernels):
    @staticmethod
    def native():
        return emulation.kernels()


class Split(Emulated):
    def splits(self, weights, T):
        return 5


def products(kernels):
    """The backend's module with other kernels."""
    names = ("linear", "dx", "dw", "masked", "masked_dx", "masked_dw")
    call = lambda name: lambda *args: getattr(cuda, name)(*args, kernels=kernels)  # noqa: E731
    return types.SimpleNamespace(**{name: call(name) for name in names})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_emulated_kernels(case, dtype):
    sparse_products.check(case, products(Emulated), dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_emulated_splits_of_the_tokens(case, dtype):
    sparse_products.check(case, products(Split), dtype, "cpu")


def test_layers(monkeypatch):
    for name, function in vars(products(Emulated)).items():
        monkeypatch.setattr(cpu, name, function)
    sparse_products.check_layer("cpu", "cpu")


@pytest.mark.parametrize("in_", [1, 31, 32, 33, 100])
def test_bits_of_single_weights(in_):
    mask = torch.rand(6, in_, generator=torch.Generator().manual_seed(in_)) < 0.4
    mask[2], mask[3] = False, True
    pattern = Pattern.from_mask(mask)
    assert torch.equal(Emulated(torch.zeros(1, in_)).bits(pattern), pack_mask(mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_and_its_rounding(dtype):
    """y_ij = x_ij w_j: products of two are exact in fp32, so that only the store rounds."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()].view(-1, 64)
    mask = torch.eye(64, dtype=torch.bool)
    w = torch.randn(64, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    w[0], w[1], w[2] = 1, -1, 0.5
    y = products(Emulated).masked(x, torch.diag(w), pack_mask(mask), None)
    torch.testing.assert_close(y, (x.float() * w.float()).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_row(dtype):
    x = torch.ones(9, 64, dtype=dtype)
    x[4, 40], x[7, 3] = torch.nan, torch.inf
    mask = torch.zeros(32, 64, dtype=torch.bool)
    mask[:, 32:] = True
    y = products(Emulated).linear(x, mask.to(dtype), None, Pattern.from_mask(mask, 32))
    assert y.isnan().all(1).tolist() == [row == 4 for row in range(9)]
    assert y[7].isfinite().all()  # the product with a block that is not kept is not computed


def test_sizes_beyond_32_bits_are_refused():
    with pytest.raises(ValueError, match="up to 2147481599 tokens and features"):
        Emulated(torch.zeros(1, 1).expand(2**31, 1))


def test_few_blocks_split_the_tokens():
    k = Emulated(torch.zeros(1, 1))
    assert k.splits(3072 * 768 // 4, 8192) == 3 * 108 // 72
    assert k.splits(3072 * 768, 8192) == 1 and k.splits(0, 8192) == 16 and k.splits(64 * 64, 100) == 1


# --- on a GPU ---

on_gpu = pytest.mark.usefixtures("cuda_backend")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*ALL, *SPLIT, *LARGE], ids=str)
def test_device(case, dtype):
    sparse_products.check(case, cuda, dtype, "cuda")


@on_gpu
def test_layers_on_a_gpu():
    sparse_products.check_layer("cuda", "cuda")


@on_gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_call_same_bits(case):
    sparse_products.check_repeat(case, cuda)


@on_gpu
@pytest.mark.parametrize("case", [LARGE[0], LARGE[3], LARGE[4]], ids=str)
def test_waits_for_nothing_and_is_captured(case):
    sparse_products.check_capture(case, cuda)
