"""What the panel drivers do differently on a GPU, on a machine that needs none: sizes, strides, sums in float32, joined
teachers."""

from __future__ import annotations

import emulation
import pytest
import torch
from distillation import batch
from distillation import check as check_distillation

from pycse.backends.cpu import contrastive as cpu
from pycse.backends.cuda import contrastive as cuda
from pycse.backends.torch import distill as plain
from pycse.panels import contrastive as panel
from pycse.panels import distill as distillation
from pycse.panels import products

import cases
from oracle import Case, check

REAL_MM, REAL_ADDMM = torch.mm, torch.addmm


def test_panel_rows_of_the_known_size():
    assert products.panel_rows(65536, 65536, 768, 2) == 2048
    assert products.panel_rows(65536, 65536, 768, 4) == 1024  # a panel in float32 weighs twice as much


@pytest.mark.parametrize("D", [1, 64, 384, 768, 4096])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("N", [1, 1000, 65536, 1 << 20, 1 << 27])
@pytest.mark.parametrize("B", [1, 2, 127, 1025, 3071, 65536, 1 << 20])
def test_panel_rows(B, N, D, itemsize):
    c = products.panel_rows(B, N, D, itemsize)
    assert 1 <= c <= B
    assert c == B or c % products.ROUND_ROWS == 0
    assert c * N * itemsize <= 2 * products.PANEL_BYTES or c <= 2 * products.ROUND_ROWS
    if c < B:  # the last panel is no crumb
        assert (B - 1) % c + 1 > c // 8 or B < 4 * products.ROUND_ROWS or c <= 4 * products.ROUND_ROWS
        if c * N * itemsize < products.PANEL_BYTES // 2:
            assert 0.8 * 3 * c * N * itemsize >= 8 * N * D or c >= B // 2


@pytest.mark.parametrize("itemsize, step", [(2, 64), (4, 32), (8, 16)])
def test_row_stride(itemsize, step):
    gpu = torch.device("cuda")
    assert [products.row_stride(N, gpu, itemsize) for N in (1, step, step + 1)] == [step, step, 2 * step]
    assert products.row_stride(33, torch.device("cpu"), itemsize) == 33


class Emulated(cuda.Kernels):
    @staticmethod
    def native():
        return emulation.kernels()


@pytest.mark.parametrize("backend", ["torch", "emulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [cases.SHAPES[5], *cases.OPTIONS[::3], *cases.SYMMETRIC[1:6:2]], ids=str)
def test_rows_of_a_panel_lie_apart(case, dtype, backend, monkeypatch):
    monkeypatch.setattr(products, "row_stride", lambda N, *_: N + 11)
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    if backend == "emulated":
        if not emulation.takes(case):
            pytest.skip("backend='cuda' has no guides")
        emulation.instead(monkeypatch, cpu, "contrastive", lambda p: panel.contrastive(p, Emulated))
    check(case, "cpu" if backend == "emulated" else backend, dtype)


@pytest.fixture
def sums_in_float32(monkeypatch):
    """CUDA's products of 16-bit matrices into float32, in plain PyTorch on the processor; how often they were asked
    for."""
    calls = {"mm": 0, "addmm": 0}

    def mm(a, b, *, out=None, out_dtype=None):
        if out_dtype is None:
            return REAL_MM(a, b, out=out)
        calls["mm"] += 1
        assert out_dtype == out.dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
        return REAL_MM(a.float(), b.float(), out=out)

    def addmm(total, a, b, *, out_dtype, out):
        calls["addmm"] += 1
        assert out_dtype == out.dtype == total.dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
        assert out.data_ptr() == total.data_ptr()
        return out.add_(REAL_MM(a.float(), b.float()))

    monkeypatch.setattr(products, "sums_in_float32", lambda device: True)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    return calls


@pytest.mark.parametrize("case", [Case(40, 90), Case(40, options={"symmetric": True}), Case(13, 90)], ids=str)
def test_gradients_of_keys_are_summed_in_float32(case, sums_in_float32, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    check(case, "torch", torch.bfloat16)
    panels = -(-case.B // 13)
    assert sums_in_float32 == ({"mm": 1, "addmm": panels - 1} if panels > 1 else {"mm": 0, "addmm": 0})


@pytest.mark.parametrize("blocks", [False, True])
def test_distillation_is_summed_in_float32(blocks, sums_in_float32, monkeypatch):
    monkeypatch.setattr(distillation, "panel_rows", lambda d, *_: min(d.z1.shape[0], 13))
    if blocks:
        monkeypatch.setattr(distillation, "TEACHER_BYTES", 0)
        monkeypatch.setattr(distillation, "TEACHER_BLOCK", 10)
    check_distillation(*batch(70), "torch", torch.bfloat16, shuffle="none", teacher_temperature=0.1)
    assert sums_in_float32["addmm"] > 6


def test_without_a_gpu_nothing_is_tried():
    assert not products.sums_in_float32(torch.device("cpu"))


@pytest.mark.parametrize("weights", [None, [1, 2, 3]], ids=["equal", "unequal"])
@pytest.mark.parametrize("widths", [(24, 24, 24), (24, 16, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_joined_teachers(dtype, widths, weights, monkeypatch):
    """One normalisation of all teachers where they are alike; the same result either way."""
    joined = widths[0] == widths[1] and weights is None
    sizes = []
    real = plain.Kernels.normalize

    def normalize(self, z, *rest):
        sizes.append(tuple(z.shape))
        return real(self, z, *rest)

    monkeypatch.setattr(plain.Kernels, "normalize", normalize)
    monkeypatch.setattr(distillation, "joins", lambda d: True)
    z, teachers = batch(33, 30, teachers=widths, kind="zeros")
    check_distillation(z, teachers, "torch", dtype, seed=3, teacher_weights=weights)
    assert sizes == [(33, 30), *([(99, 24)] if joined else [(33, n) for n in widths])]
