"""The CUDA backend. Its kernels' bodies run everywhere, on one host thread (tests/kernels/emulation), and are held to
the float64 reference over the same table as every backend; with a GPU the table runs on the device as well. The
compiled kernels themselves are looked at without a GPU: no spills, no library that a machine without CUDA lacks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch
from cuda_graphs import capture, never_waits
from pycse.kernels import native

from pycse import fused_focal_infonce
from pycse.backends.cpu import contrastive as cpu
from pycse.backends.cuda import contrastive as cuda
from pycse.panels import contrastive as panel
from pycse.problem import Contrastive, Needs

import cases
from oracle import BAND, Case, check, run

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# What only these kernels can get wrong: rows that start anywhere within 16 bytes, fewer keys than one access takes,
# several own hard negatives in one access, tensors together with every option.
MORE = [
    *(Case(5, N, 9, tensors=t) for N in (5, 6, 7, 8, 9, 15, 17, 23) for t in (False, True)),
    Case(1, 9, 4, options={"hard_negative_weight": 1.0}),
    Case(2, 30, 5, options={"hard_negative_weight": 1.0}),
    Case(3, 27, 5, options={"hard_negative_weight": -1.5}, tensors=True),
    Case(7, 21, 5, options={"hard_negative_weight": 0.5, "positives": torch.tensor([20, 0, 9, 3, 14, 7, 1])}),
    Case(30, 7, 5, options={"positives": torch.arange(30) % 7, "exclude_above": 0.021}, tensors=True),
    Case(41, 67, options={"exclude_above": 0.113, "weight": cases._weights(41)}, focal=False),
    Case(37, options={"symmetric": True, "exclude_above": 0.031, "query_ids": torch.arange(37) % 5,
                      "key_ids": torch.arange(37) % 7, "weight": cases._weights(37)}, tensors=True),
    Case(19, options={"symmetric": True, "normalize": False}, D=8, temperature=1.0),
]  # fmt: skip
TABLE = [*filter(emulation.takes, cases.ALL), *MORE]


class Emulated(cuda.Kernels):
    @staticmethod
    def native():
        return emulation.kernels()


def emulate(p: Contrastive):
    return panel.contrastive(p, Emulated)


@pytest.fixture
def emulated(monkeypatch):
    emulation.instead(monkeypatch, cpu, "contrastive", emulate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_emulated_kernels(case, dtype, emulated):
    check(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_emulated_kernels_in_panels_of_13_rows(case, dtype, emulated, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    check(case, "cpu", dtype)


def problem(z1, z2, **options):
    return Contrastive(z1, z2, options.pop("temperature", 0.05), options.pop("m", 0.3), form="focal", **options)


def embeddings(B, N, D=16, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, D, generator=g, dtype=dtype), torch.randn(N, D, generator=g, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [-1, 9, 2**40, -(2**63)])
def test_a_positive_out_of_range_gives_a_nan_row(dtype, bad):
    z1, z2 = embeddings(6, 9, dtype=dtype)
    positives = torch.tensor([0, 1, bad, 3, 8, 5])
    result = emulate(problem(z1, z2, positives=positives, needs=Needs(z1=True, z2=True)))
    assert result.rows.isnan().tolist() == [False, False, True, False, False, False]
    assert result.dz1.isnan().all(1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.0, -0.05, float("nan")])
def test_a_temperature_tensor_that_is_not_positive_gives_nan(temperature, symmetric):
    z1, z2 = embeddings(6, 6)
    tau = torch.tensor(temperature)
    result = emulate(problem(z1, z2, temperature=tau, symmetric=symmetric, needs=Needs(z1=True, temperature=True)))
    assert result.rows.isnan().all() and result.dz1.isnan().all() and result.dtemperature.isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tensor", [False, True])
def test_nan_and_infinity_give_nan(bad, symmetric, tensor):
    z1, z2 = embeddings(9, 9, dtype=torch.float32)
    z2[3, 5] = bad
    tau = torch.tensor(0.05) if tensor else 0.05
    assert emulate(problem(z1, z2, temperature=tau, symmetric=symmetric)).rows.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-11, 1e-6, 1e15, 1e25, 1e37])
def test_extreme_norms(scale, dtype, emulated):
    z1, z2 = embeddings(12, 12, 8)
    scale = scale if dtype == torch.float32 else scale**8 if scale > 1 else scale
    results = []
    for backend, a, b, unit in (("reference", z1, z2, 1.0), ("cpu", z1 * scale, z2 * scale, scale)):
        kind = torch.float64 if backend == "reference" else dtype
        a, b = a.to(kind).requires_grad_(), b.to(kind).requires_grad_()
        loss = fused_focal_infonce(a, b, backend=backend)
        loss.backward()
        results.append((loss.detach().double(), a.grad.double() * unit, b.grad.double() * unit))
    (loss, da, db), (loss_e, da_e, db_e) = results
    torch.testing.assert_close(loss_e, loss, rtol=1e-5, atol=0)
    if scale < 1e30 or dtype == torch.float64 and scale < 1e250:  # beyond, gradients are denormal
        torch.testing.assert_close(da_e, da, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(db_e, db, rtol=1e-3, atol=1e-6)


def test_zero_vectors_get_zero_gradient(emulated):
    z1, z2 = embeddings(6, 9, 8, torch.float32)
    z1[2], z2[4], z2[8] = 0, 0, 1e-13
    z1.requires_grad_(), z2.requires_grad_()
    fused_focal_infonce(z1, z2, backend="cpu").backward()
    assert z1.grad.isfinite().all() and z2.grad.isfinite().all()
    assert not z1.grad[2].any() and not z2.grad[4].any() and not z2.grad[8].any()


@pytest.mark.parametrize("temperature", [0.05, torch.tensor(0.05)], ids=["fixed shift", "row maximum"])
def test_confident_rows_keep_their_digits(temperature, emulated):
    z = torch.nn.functional.normalize(embeddings(64, 1, 256)[0], dim=1)
    losses, gradients = [], []
    for backend, dtype in (("reference", torch.float64), ("cpu", torch.float32)):
        a, b = z.detach().to(dtype).clone().requires_grad_(), z.to(dtype)
        loss = fused_focal_infonce(a, b, temperature, backend=backend)
        loss.backward()
        losses.append(loss.detach().double()), gradients.append(a.grad.double())
    assert 0 < losses[0] < 1e-4
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-3 * gradients[0].abs().max().item())


def test_strided_rows(emulated):
    """Embeddings whose rows start anywhere: the leading dimension is not a multiple of 16 bytes."""
    base1, base2 = (torch.randn(20, 37, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    for dtype in (torch.float32, torch.bfloat16):
        a, b = base1.to(dtype)[:, 3:36].requires_grad_(), base2.to(dtype)[:, 1:34].requires_grad_()
        strided = torch.autograd.grad(fused_focal_infonce(a, b, backend="cpu"), (a, b))
        a, b = a.detach().contiguous().requires_grad_(), b.detach().contiguous().requires_grad_()
        packed = torch.autograd.grad(fused_focal_infonce(a, b, backend="cpu"), (a, b))
        for x, y in zip(strided, packed):
            torch.testing.assert_close(x, y, rtol=10 * BAND[dtype], atol=1e-6)


REFUSED = [
    ("guides", {"guide_logits": torch.zeros(6, 9)}),
    ("directions, listed negatives and log-sums", {"directions": ["qd", "qq"]}),
    ("directions, listed negatives and log-sums", {"negatives": (torch.zeros(7).long(), torch.zeros(0).long())}),
]


@pytest.mark.parametrize("name, options", REFUSED, ids=str)
def test_what_it_lacks_is_refused_by_name(emulated, name, options):
    z1, z2 = embeddings(6, 9)
    message = f"backend='cuda' cannot run here: it has no kernels for {name}; triton and torch have"
    with pytest.raises(RuntimeError, match=message):
        fused_focal_infonce(z1, z2, backend="cpu", **options)


# --- the compiled kernels, with no GPU ---


def module_file() -> str:
    native()
    from pycse.kernels import _native

    return _native.__file__


def compiled() -> str:
    if not native().cuda_compiled():
        pytest.skip("pycse was built without CUDA (no nvcc, or PYCSE_CUDA=0)")
    return module_file()


def test_no_library_of_cuda_is_needed_to_load():
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    dynamic = subprocess.run(["readelf", "-d", module_file()], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in dynamic
    assert not re.findall(r"lib(cuda|cudart|nv\w+)\.so", dynamic)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_no_path_of_the_build_machine():
    content = Path(module_file()).read_bytes()
    root = Path(__file__).resolve().parents[3]
    nvcc = shutil.which("nvcc")
    toolkit = str(Path(nvcc).resolve().parents[1]) if nvcc else ""
    for path in {str(root), str(Path.home()), sys.prefix, toolkit}:
        if len(path) > 5 and path != "/usr/local":
            assert path.encode() not in content, path
    assert b".cu\0" not in content and b"/targets/x86_64-linux" not in content


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="neither cuobjdump nor triton, which brings one, is installed")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
        if not Path(found).exists():
            pytest.skip("neither the CUDA toolkit nor triton has cuobjdump here")
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_kernel_spills(arch):
    """Nothing in local memory: neither registers that did not fit nor arrays with an index known only at run time."""
    usage = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", "--gpu-architecture", arch, compiled()], capture_output=True, text=True
    )
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    if not kernels:
        pytest.skip(f"this build has no machine code for {arch} (PYCSE_CUDA_ARCHS)")
    names = "".join(name for name, *_ in kernels)
    sparse = ("linear", "dx", "dw", "add_splits", "mark")
    for kernel in ("rows", "columns", "symmetric", "positives", "normalize", "project", "distill", "small", *sparse):
        assert f"{kernel}_kernel" in names
    assert not [(name, stack, local) for name, _, stack, _, local in kernels if int(stack) or int(local)]


# --- on a GPU ---

on_gpu = pytest.mark.usefixtures("cuda_backend")


@pytest.fixture
def panels(monkeypatch):
    """Small batches too go through the panel driver; test_cuda_small.py has their one launch."""
    monkeypatch.setattr(cuda, "fits", lambda p: False)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*TABLE, Case(3000, 5001, 96), Case(2500, D=64, options={"symmetric": True})], ids=str)
def test_device(case, dtype, panels):
    check(case, "cuda", dtype, "cuda")


@on_gpu
@pytest.mark.parametrize("symmetric", [False, True])
def test_same_call_same_bits(symmetric, panels):
    case = Case(3000, D=96, options={"symmetric": symmetric})
    first, second = (run(case, "cuda", torch.bfloat16, "cuda") for _ in range(2))
    for name in first.values:
        assert torch.equal(first.values[name], second.values[name])


@on_gpu
def test_waits_for_nothing_and_is_captured(panels):
    z1, z2 = (torch.randn(300, 64, device="cuda", requires_grad=True) for _ in range(2))
    tau = torch.tensor(0.05, device="cuda", requires_grad=True)

    def step():
        return torch.autograd.grad(fused_focal_infonce(z1, z2, tau, backend="cuda"), (z1, z2, tau))

    never_waits(step)
    replay = capture(step)
    with torch.no_grad():
        z1.normal_()
        tau.fill_(0.08)
    for x, y in zip(replay(), step()):
        torch.testing.assert_close(x, y)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_panels_of_many_sizes(dtype, panels, monkeypatch):
    for c in (1, 13, 512):
        monkeypatch.setattr(panel, "panel_rows", lambda B, *_, c=c: min(B, c))
        for case in (Case(700, 1303, 40), Case(700, D=40, options={"symmetric": True}, tensors=True)):
            check(case, "cuda", dtype, "cuda")


@on_gpu
def test_a_bad_positive_stays_in_bounds(panels):
    z1, z2 = (z.cuda().float() for z in embeddings(6, 9))
    positives = torch.tensor([0, 1, 2**40, 3, 8, -1], device="cuda")
    loss = fused_focal_infonce(z1, z2, positives=positives, reduction="none", backend="cuda")
    assert loss.isnan().tolist() == [False, False, True, False, False, True]


@on_gpu
def test_another_device_is_left_as_it_was():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    z = torch.randn(20, 8, device="cuda:1", requires_grad=True)
    fused_focal_infonce(z, z, backend="cuda").backward()
    assert torch.cuda.current_device() == 0
    losses = [fused_focal_infonce(z, z, backend=backend) for backend in ("cuda", "reference")]
    torch.testing.assert_close(*losses)
