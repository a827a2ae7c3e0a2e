"""The GEMM with the loss as its epilogue for sm_90a (kernels/cuda/fused.h). On the host its blocks and clusters run
thread by thread on models of the barriers, the copy engine and wgmma, by the PTX manual; what is asynchronous happens
as early as it may, or as late. It is off by default (pycse.backends.cuda.contrastive.FUSED); these tests switch it
on."""

from __future__ import annotations

import re
import subprocess

import emulation
import pytest
import torch
from cuda_graphs import capture
from pycse.kernels import native
from test_cuda import compiled, cuobjdump

from pycse import fused_focal_infonce
from pycse.backends.cpu import contrastive as cpu
from pycse.backends.cuda import contrastive as cuda
from pycse.panels import contrastive as panel
from pycse.problem import Contrastive

import cases
from oracle import Case, check, run


class Emulated(cuda.Kernels):
    used = 0

    @staticmethod
    def native():
        return emulation.kernels()

    def empty(self, *shape, dtype):
        return emulation.poisoned(*shape, dtype=dtype)

    def fused_rows(self, z1hat, S, i0, grad):
        Emulated.used += self._fuses(z1hat)
        return super().fused_rows(z1hat, S, i0, grad)


def emulate(p: Contrastive):
    return panel.contrastive(p, Emulated)


@pytest.fixture(
    params=[(1, True), (2, True), (1, False), (2, False)],
    ids=["blocks-early", "clusters-early", "blocks-late", "clusters-late"],
)
def emulated(request, monkeypatch):
    cluster, early_copies = request.param
    monkeypatch.setattr(cpu, "contrastive", emulate)
    monkeypatch.setattr(cuda, "FUSED", cluster)
    Emulated.used = 0
    emulation.kernels().emulate_with(0, early_copies)
    yield
    emulation.kernels().emulate_with(0, True)


# Rows around the tile's 128 and a warpgroup's 64; keys around 256 and a store's 64; features around a step's 64.
TABLE = [
    Case(1, 8, 8),
    Case(64, D=64),
    Case(63, 64, 72),
    Case(65, 256, 56),
    Case(129, 264, 128, focal=False),
    Case(130, 520, 24),
    Case(300, 520, 328),  # more steps than slots, and tiles for every block
    Case(136, D=8, kind="zeros"),
    Case(40, D=64, kind="confident"),
    Case(40, D=64, kind="scales"),
    Case(40, D=64, kind="duplicates"),
    Case(20, 48, 32, options={"positives": torch.arange(20) * 2 + 3}),
    Case(20, 8, 32, options={"positives": torch.arange(20) % 8}),
    Case(24, 72, 32, options={"hard_negative_weight": 1.5}),
    Case(140, 280, 16, options={"query_ids": cases._ids(140, 6), "key_ids": cases._ids(280, 6, 1)}),
    Case(24, 72, 32, options={"query_ids": cases._ids(24, 5), "key_ids": cases._ids(72, 5, 1),
                              "hard_negative_weight": -0.7, "weight": cases._weights(24)}),
    Case(64, D=32, options={"query_ids": torch.arange(64) // 32, "key_ids": torch.arange(64) // 32}),  # chunks of none but one id
    Case(136, D=16, options={"reduction": "none", "weight": cases._weights(136)}),
]  # fmt: skip


@pytest.mark.parametrize("rows", [None, 13, 128])
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_emulated_tiles(case, rows, emulated, monkeypatch):
    if rows is not None:
        monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, rows))
    check(case, "cpu", torch.bfloat16)
    assert Emulated.used > 0


def test_forward_alone(emulated):
    z1, z2 = (z.bfloat16() for z in Case(70, 136, 40).embeddings())
    losses = [fused_focal_infonce(z1, z2, backend=backend) for backend in ("reference", "cpu")]
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)
    assert Emulated.used > 0


@pytest.mark.parametrize("bad", [-1, 16, 2**40])
def test_a_positive_out_of_range_gives_a_nan_row(bad, monkeypatch):
    monkeypatch.setattr(cuda, "FUSED", 1)
    z1, z2 = (z.bfloat16() for z in Case(6, 16, 16).embeddings())
    result = emulate(Contrastive(z1, z2, 0.05, 0.3, form="focal", positives=torch.tensor([0, 1, bad, 3, 8, 5])))
    assert result.rows.isnan().tolist() == [k == 2 for k in range(6)]


@pytest.mark.parametrize(
    "case",
    [Case(16, 17, 16), Case(16, D=12), Case(16, temperature=0.01), Case(16, options={"exclude_above": 0.1}),
     Case(16, tensors=True), Case(16, options={"symmetric": True})], ids=str,
)  # fmt: skip
def test_what_it_does_not_take_goes_another_way(case, emulated):
    check(case, "cpu", torch.bfloat16)
    if case.D != 12:  # z1hat is packed: rows of 24 bytes
        assert Emulated.used == 0


def test_off_by_default():
    assert cuda.FUSED == 0


def test_compiled_kernel_multiplies_by_wgmma_and_copies_by_tma():
    sass = subprocess.run(
        [cuobjdump(), "-sass", "--gpu-architecture", "sm_90a", compiled()], capture_output=True, text=True
    ).stdout
    kernels = dict(re.findall(r"Function : (\S*fused_kernel\S*)(.*?)(?=Function :|\Z)", sass, re.S))
    if not kernels:
        pytest.skip("this build has no machine code for sm_90a (PYCSE_CUDA_ARCHS)")
    for name, code in kernels.items():
        for instruction in ("HGMMA.64x256x16.F32.BF16", "UTMALDG.2D", "SYNCS.PHASECHK", "USETMAXREG"):
            assert instruction in code, f"{name} has no {instruction}"
        assert "LDL" not in code and "STL" not in code
        # The epilogue of chunks without exceptions: 32 sums, each an exponential and at most 9 or so beside it.
        stretches = [s for s in re.split(r"\b(?:BRA|BSYNC|BAR|EXIT)\b", code) if s.count("MUFU.EX2") == 32]
        plain = [len(re.findall(r"/\*[0-9a-f]{4,}\*/  ", s)) for s in stretches if "FSEL" not in s]
        assert len(plain) == 4 and max(plain) <= 340, f"{name}: instructions {plain}"


# --- on a GPU ---


@pytest.fixture(params=[1, 2], ids=["blocks", "clusters"])
def switched_on(request, monkeypatch, cuda_backend):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is sm_90a's, and the GPU is another")
    assert native().cuda.fused_runs((torch.cuda.current_device(), 0)), "built without 90a (PYCSE_CUDA_ARCHS)"
    monkeypatch.setattr(cuda, "FUSED", request.param)
    monkeypatch.setattr(cuda, "fits", lambda p: False)


@pytest.mark.parametrize("case", [*TABLE, Case(3000, 5008, 96), Case(2048, D=768), Case(4096, 8192, 768)], ids=str)
def test_device(case, switched_on):
    check(case, "cuda", torch.bfloat16, "cuda")


def test_same_call_same_bits(switched_on):
    case = Case(3000, 5008, 96)
    first, second = (run(case, "cuda", torch.bfloat16, "cuda") for _ in range(2))
    for name in first.values:
        assert torch.equal(first.values[name], second.values[name])


def test_is_captured(switched_on):
    z1, z2 = (torch.randn(600, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))

    def step():
        return torch.autograd.grad(fused_focal_infonce(z1, z2, backend="cuda"), (z1, z2))

    replay = capture(step)
    with torch.no_grad():
        z1.normal_()
    for x, y in zip(replay(), step()):  # up to the library's products, which may be other ones in a graph
        torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-5)
