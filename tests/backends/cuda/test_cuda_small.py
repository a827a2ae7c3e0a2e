"""Small batches in one launch (kernels/cuda/small.h). Its phases run everywhere, one after another on the host, and are
held to the float64 reference over the table of every backend; with a GPU also as the cooperative launch that they
are."""

from __future__ import annotations

import emulation
import pytest
import torch
from cuda_graphs import capture

from pycse import fused_focal_infonce
from pycse.backends.cpu import contrastive as cpu
from pycse.backends.cuda import contrastive as cuda
from pycse.backends.cuda.norms import Norms
from pycse.problem import Contrastive, Needs

import cases
from oracle import BAND, Case, check, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # fp16 arrives as fp32 (pycse/ops/fused.py)
# Around the tiles of 64 x 64 and steps of 64 (bf16) or 32 (fp32) features, rows whose addresses are no multiple of 16
# bytes.
MORE = [
    *(Case(B, N, D) for B, N, D in ((63, 64, 64), (64, 65, 63), (65, 129, 65), (128, 128, 1), (3, 200, 100), (130, 131, 31))),
    *(Case(B, D=D, options={"symmetric": True}) for B, D in ((64, 64), (129, 33), (200, 40))),
    Case(37, options={"symmetric": True, "exclude_above": 0.031, "query_ids": torch.arange(37) % 5,
                      "key_ids": torch.arange(37) % 7, "weight": cases._weights(37)}, tensors=True),
    Case(19, options={"symmetric": True, "normalize": False}, D=8, temperature=1.0),
    Case(7, 21, 5, options={"hard_negative_weight": 0.5, "positives": torch.tensor([20, 0, 9, 3, 14, 7, 1])}),
]  # fmt: skip
TABLE = [*filter(emulation.takes, cases.ALL), *MORE]


class Emulated(Norms):
    @staticmethod
    def native():
        return emulation.kernels()

    def empty(self, *shape, dtype):
        return emulation.poisoned(*shape, dtype=dtype)


def emulate(p: Contrastive):
    return cuda.small(p, Emulated(p.z1))


@pytest.fixture
def emulated(monkeypatch):
    emulation.instead(monkeypatch, cpu, "contrastive", emulate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_emulated_phases(case, dtype, emulated):
    check(case, "cpu", dtype)


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("case", [case for case in TABLE if case.B < 24], ids=str)
def test_phases_by_a_thread_block(case, ascending, emulated):
    """Rows, columns and norms by fibers (kernels/cuda/fibers.h): a barrier that is missing shows."""
    emulation.kernels().emulate_with(128, ascending)
    try:
        check(case, "cpu", torch.bfloat16)
    finally:
        emulation.kernels().emulate_with(0, True)


@pytest.mark.parametrize("needs", [Needs(*map(bool, (k & 1, k & 2, k & 4, k & 8))) for k in range(16)], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_which_gradients_are_needed(needs, symmetric, normalize):
    z1, z2 = Case(20, 20, 24, kind="unit").embeddings()
    make = lambda needs: emulate(  # noqa: E731
        Contrastive(
            z1.float(), z2.float(), torch.tensor(0.05), torch.tensor(0.3), form="focal", symmetric=symmetric,
            normalize=normalize, needs=needs,
        )
    )  # fmt: skip
    all_of_them, these = make(Needs(True, True, True, True)), make(needs)
    assert torch.equal(these.rows, all_of_them.rows) and torch.equal(these.loss, all_of_them.loss)
    for x, y, needed in zip(these[1:5], all_of_them[1:5], needs):
        assert (x is not None) == needed
        if x is not None:
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_a_positive_out_of_range_gives_a_nan_row(dtype, bad):
    z1, z2 = (z.to(dtype) for z in Case(6, 9, 16).embeddings())
    p = Contrastive(z1, z2, 0.05, 0.3, form="focal", positives=torch.tensor([0, 1, bad, 3, 8, 5]), needs=Needs(z1=True))
    result = emulate(p)
    assert result.rows.isnan().tolist() == result.dz1.isnan().all(1).tolist() == [k == 2 for k in range(6)]


@pytest.mark.parametrize("scale", [1e-11, 1e-6, 1e15, 1e37])
def test_extreme_norms(scale, emulated):
    z1, z2 = Case(12, 12, 8).embeddings()
    results = []
    for backend, dtype, unit in (("reference", torch.float64, 1.0), ("cpu", torch.float32, scale)):
        a, b = ((z * unit).to(dtype).requires_grad_() for z in (z1, z2))
        loss = fused_focal_infonce(a, b, backend=backend)
        loss.backward()
        results.append((loss.detach().double(), a.grad.double() * unit, b.grad.double() * unit))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    if scale < 1e30:  # beyond, gradients are denormal
        for x, y in zip(results[1][1:], results[0][1:]):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)


def test_strided_rows(emulated):
    base1, base2 = (torch.randn(20, 37, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    for dtype in (torch.float32, torch.bfloat16):
        a, b = base1.to(dtype)[:, 3:36].requires_grad_(), base2.to(dtype)[:, 1:34].requires_grad_()
        strided = torch.autograd.grad(fused_focal_infonce(a, b, backend="cpu"), (a, b))
        a, b = a.detach().contiguous().requires_grad_(), b.detach().contiguous().requires_grad_()
        packed = torch.autograd.grad(fused_focal_infonce(a, b, backend="cpu"), (a, b))
        for x, y in zip(strided, packed):
            torch.testing.assert_close(x, y, rtol=10 * BAND[dtype], atol=1e-6)


def test_which_batches_are_small():
    fits = lambda B, N, D, dtype: cuda.fits(  # noqa: E731
        Contrastive(torch.empty(B, D, dtype=dtype), torch.empty(N, D, dtype=dtype), 0.05, 0.3)
    )
    assert fits(1024, 1024, 768, torch.bfloat16) and fits(512, 512, 768, torch.float32)
    assert not fits(2048, 2048, 768, torch.bfloat16) and not fits(1024, 1024, 768, torch.float32)
    assert not fits(1, 4096, 2, torch.bfloat16) and not fits(8, 8, 8, torch.float64)


# --- on a GPU ---

on_gpu = pytest.mark.usefixtures("cuda_backend")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [*TABLE, Case(512, D=768), Case(1024, D=768), Case(512, D=768, options={"symmetric": True})], ids=str
)
def test_device(case, dtype):
    check(case, "cuda", dtype, "cuda")


@on_gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("B", [64, 512, 1000])
def test_one_launch(B, symmetric):
    """Of this package's kernels; a mean over unweighted rows needs no other either."""
    z1, z2 = (torch.randn(B, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))

    def step():
        return torch.autograd.grad(fused_focal_infonce(z1, z2, symmetric=symmetric, backend="cuda"), (z1, z2))

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("small_kernel" in name for name in names) == 1
    assert not [name for name in names if "gemm" in name.lower()]


@on_gpu
@pytest.mark.parametrize("symmetric", [False, True])
def test_same_call_same_bits(symmetric):
    case = Case(500, D=96, options={"symmetric": symmetric})
    first, second = (run(case, "cuda", torch.bfloat16, "cuda") for _ in range(2))
    for name in first.values:
        assert torch.equal(first.values[name], second.values[name])


@on_gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_captured(dtype, symmetric):
    z1, z2 = (torch.randn(300, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))

    def step():
        return torch.autograd.grad(fused_focal_infonce(z1, z2, symmetric=symmetric, backend="cuda"), (z1, z2))

    replay = capture(step)
    for _ in range(3):
        with torch.no_grad():
            z1.normal_()
        for x, y in zip(replay(), step()):
            assert torch.equal(x, y)
