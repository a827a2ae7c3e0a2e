"""The Triton backend against the float64 reference.

Every test here runs on a CUDA GPU where there is one. In any case test_everything_in_the_interpreter runs the file
again in a process of its own with TRITON_INTERPRET=1, on CPU tensors, in float32, float64 and float16 (the
interpreter's bfloat16 truncates, and its tl.dot misreads it); and test_kernels_compile makes machine code of every
kernel without a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton.language", reason="triton is not installed: pip install 'pycse-kernels[triton]'")

from cuda_graphs import capture
from interpreter import CUDA, INTERPRETED, in_another_process, run_interpreted

from pycse import fused_focal_infonce
from pycse.logits import GRADIENTS
from pycse.panels import contrastive as panel
from pycse.problem import Contrastive, Needs

import cases
import oracle
from oracle import Case, check, run

triton_backend = importlib.import_module("pycse.backends.triton.contrastive")
triton_norms = importlib.import_module("pycse.backends.triton.norms")

if CUDA:
    DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    TABLE = [(case, dtype) for dtype in DTYPES for case in cases.ALL]
else:  # the interpreter takes a third of a second a case: all small ones in float32 only
    SOME = [*cases.SHAPES[:5], cases.LOGITS[0], cases.LOGITS[8], cases.HOSTILE[0], cases.HOSTILE[4], cases.OPTIONS[-1]]
    SOME += [cases.SYMMETRIC[1], cases.SYMMETRIC[4], cases.SYMMETRIC[5], cases.SYMMETRIC[10]]
    DTYPES = [torch.float32]
    TABLE = [(case, torch.float32) for case in cases.ALL if case.B * (case.N or case.B) < 60000]
    TABLE += [(case, dtype) for dtype in (torch.float64, torch.float16) for case in SOME]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_in_the_interpreter():
    run_interpreted(__file__, len(cases.ALL))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("arch", ["80", "90"])
def test_kernels_compile(arch, capsys):
    text = in_another_process("tests/helpers/triton_compile.py", arch)
    with capsys.disabled():
        print(f"\n{text}")


@pytest.mark.parametrize("case, dtype", TABLE, ids=str)
def test_table(case, dtype, device):
    check(case, "triton", dtype, device)


PANELS = [
    Case(40, 90, 33),
    Case(27, 81, options={"hard_negative_weight": 0.5, "positives": torch.arange(27) + 5}, temperature=0.01),
    Case(40, 90, tensors=True, options={"exclude_above": 0.013, "weight": torch.linspace(0, 2, 40)}),
    Case(40, options={"symmetric": True, "exclude_above": -0.417, "weight": torch.linspace(0, 2, 40)}),
    Case(40, options={"symmetric": True}, temperature=0.01, tensors=True),
    Case(40, options={"symmetric": True, "query_ids": torch.arange(40) // 3, "key_ids": torch.arange(40) % 11,
                      "weight": torch.linspace(0, 2, 40)}),
    Case(40, options={"symmetric": True}, focal=False),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PANELS, ids=str)
def test_panels_of_13_rows_in_blocks_of_32(case, dtype, device, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    for module in (triton_backend, triton_norms):
        monkeypatch.setattr(module, "block_of", lambda n: 32)
    check(case, "triton", dtype, device)


@pytest.mark.parametrize("case", PANELS, ids=str)
def test_rows_of_a_panel_lie_apart(case, device, monkeypatch):
    monkeypatch.setattr(panel.products, "row_stride", lambda N, *_: N + 11)
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    check(case, "triton", torch.float32, device)


# The GEMM's tiles: one row or column less, as many, one more; features that fill no block.
TILED = [Case(B, N, D) for B, N, D in ((127, 255, 63), (128, 256, 64), (129, 257, 65), (131, 509, 16))]
TILED += [
    Case(129, 258, 32, options={"hard_negative_weight": -1.0, "query_ids": torch.arange(129) // 2, "key_ids": torch.arange(258) % 70}),
    Case(131, 300, 48, options={"positives": torch.arange(131) * 2 + 7}, focal=False),
    Case(128, D=64, options={"symmetric": True}),
    Case(257, D=65, options={"symmetric": True, "weight": torch.linspace(0, 2, 257)}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["largest", "smallest"] if CUDA else ["largest"])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_fused_tiles(case, size, dtype, device, monkeypatch):
    if INTERPRETED:  # there float32 is fused, and the table has its small tiles: now the largest of a GPU
        monkeypatch.setitem(triton_backend.TILES, ("ieee", 80), (triton_backend.Tile(128, 256, 64, 8, 4),))
    real = triton_backend.device_properties(torch.device(device))
    monkeypatch.setattr(triton_backend, "device_properties", lambda _: (real[0], 1 if size == "largest" else 1 << 30))
    check(case, "triton", dtype, device)


@pytest.mark.parametrize("case", TILED, ids=str)
def test_operands_through_tensor_descriptors(case, device, monkeypatch):
    if triton_backend.tensor_descriptor() is None:
        pytest.skip("this Triton has no tensor descriptors")
    if CUDA and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tiles are copied by the hardware from compute capability 9.0 on")
    t = triton_backend.Tile(64, 64, 32, 4, 2, copied=True) if INTERPRETED else None
    real, used = triton_backend.tile, []
    monkeypatch.setattr(triton_backend, "tile", lambda *a, **k: t or real(*a, **k)._replace(copied=True))
    describable = triton_backend.describable
    monkeypatch.setattr(triton_backend, "describable", lambda z: used.append(describable(z)) or used[-1])
    check(case, "triton", torch.bfloat16 if CUDA else torch.float32, device)
    assert all(used) == (case.D % 8 == 0) and used


@pytest.mark.parametrize("case", [TILED[4], Case(64, 100, kind="confident"), TILED[7], PANELS[5]], ids=str)
def test_fused_and_separate_kernels_agree(case, device, monkeypatch):
    dtype = torch.bfloat16 if CUDA else torch.float32  # where a GPU fuses
    fused = run(case, "triton", dtype, device)
    monkeypatch.setattr(triton_backend.Kernels, "_fuses", lambda self: False)
    separate = run(case, "triton", dtype, device)
    for name, error in fused.errors(separate).items():
        assert error < (2e-2 if CUDA else 5e-6), name


@pytest.mark.parametrize("case", [PANELS[0], PANELS[2], PANELS[3], PANELS[5]], ids=str)
def test_same_call_same_bits(case, device):
    first, second = (run(case, "triton", DTYPES[-1], device) for _ in range(2))
    for name in first.values:
        assert torch.equal(first.values[name], second.values[name]), name


@pytest.mark.parametrize("case", [TILED[3], TILED[7], cases.OPTIONS[0], cases.SYMMETRIC[3]], ids=str)
def test_tf32(case, cuda, monkeypatch):
    """Triton cuts operands off where cuBLAS rounds: cosines come out up to 2^-10 smaller, logits 20 times that."""
    monkeypatch.setitem(oracle.BAND, torch.float32, 1e-2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check(case, "triton", torch.float32, cuda)
    finally:
        torch.set_float32_matmul_precision(before)


def problem(device: str, B: int = 20, N: int = 33, D: int = 24, dtype=torch.float32, **options: Any) -> Contrastive:
    """What the op hands to a backend, values unchecked."""
    g = torch.Generator().manual_seed(5)
    z1, z2 = (torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype).to(device) for n in (B, N))
    base: dict[str, Any] = {"temperature": 0.05, "m": 0.3, "form": "focal", "needs": Needs(True, True)}
    return Contrastive(z1, z2, **{**base, **options})


EACH = torch.linspace(-0.1, 0.3, 35)
ALONE = [
    {"exclude_above": 0.2},
    {"form": "infonce"},
    {"positive_margin": 0.1, "hardness": 0.7, "exclude_each": EACH, "exclude_by": "constant"},
    {"form": "infonce", "hardness": 1.5, "hardness_mode": "in_batch_negatives", "exclude_each": EACH},
    {"form": "infonce", "hardness": 0.5, "hardness_mode": "hard_negatives", "hard_negative_weight": 0.3},
    {"hard_negative_weight": -1.0, "hardness": 0.5, "exclude_above": 0.4, "exclude_by": "relative"},
]


@pytest.mark.parametrize("options", ALONE, ids="+".join)
@pytest.mark.parametrize("symmetric", [False, True])
def test_each_kernel_alone(symmetric, options, device):
    """rows, columns, symmetric, normalize, project and positives beside the torch backend's, in float64."""
    plain = importlib.import_module("pycse.backends.torch.contrastive")
    B, N = (35, 35) if symmetric else (35, 105 if "hardness" in options else 81)  # own hard negatives: a multiple of B
    needs = Needs(True, True, True, True)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    p = problem(device, B, N, 24, torch.float64, needs=needs, symmetric=symmetric, **options)
    new = lambda *n: torch.full(n, torch.nan, dtype=torch.float64, device=device)  # noqa: E731
    coef = torch.linspace(0.1, 1, B, dtype=torch.float64, device=device)

    def kernels(kind: type[panel.Kernels]) -> panel.Kernels:
        state = panel.State(new(N), coef, loss=new(B), s_pos=new(B), dlogit=new(GRADIENTS, B))
        if symmetric:
            state.sums = panel.LogSums.empty(B, torch.float64, p)
            state.sums.column_max.fill_(-torch.inf)
            state.sums.column_sum.zero_()
        return kind(p, state)

    ours, theirs = kernels(triton_backend.Kernels), kernels(plain.Kernels)
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)  # noqa: E731

    p.z1[3], p.z2[4], p.z2[5] = 0, 0, p.z2[5] * 1e-14
    z1hat, expected = new(B, 24), new(B, 24)
    for k, out in ((ours, z1hat), (theirs, expected)):
        k.normalize(p.z1, None, out)
        k.normalize(p.z2, k.state.r2, None)
    ours.positives(expected, 0), theirs.positives(expected, 0)
    same(z1hat, expected)
    same(ours.state.r2, theirs.state.r2)
    same(ours.state.s_pos, theirs.state.s_pos)

    for scaled in (False, True):
        g, a, b = torch.randn(N, 24, dtype=torch.float64).to(device), new(N, 24), new(N, 24)
        f = None if scaled else torch.randn(N, dtype=torch.float64).to(device)
        ours.project(p.z2, g, ours.state.r2, a, f, scaled)
        theirs.project(p.z2, g, ours.state.r2, b, f, scaled)
        same(a, b)
        ours.project(p.z2, g, ours.state.r2, g, f, scaled)
        same(g, b)

    S = z1hat @ p.z2.t()
    half = B // 2
    parts = [(S[i:j].clone(), S[i:j].clone(), i) for i, j in ((0, half), (half, B))]
    for a, b, i0 in parts:
        f = ours.rows(a, i0, not symmetric)
        theirs.rows(b, i0, not symmetric)
        if f is not None:
            same(a * f[:, None], b)
        if symmetric:
            ours.columns(a, i0)
            theirs.columns(b, i0)
    same(ours.state.loss, theirs.state.loss)
    if not symmetric:
        same(ours.state.dlogit, theirs.state.dlogit)
    if symmetric:
        u, v = ours.state.sums, theirs.state.sums
        assert u is not None and v is not None
        same(u.lpos, v.lpos), same(u.lneg, v.lneg)
        same(u.column_sum.log2() + u.column_max, v.column_sum.log2() + v.column_max)
        for sums in (u, v):
            sums.lneg_column.copy_((v.column_sum.log2() + v.column_max) * 0.6931471805599453)
            sums.lse_column.copy_(torch.logaddexp(sums.lneg_column, v.lpos))
        for a, b, i0 in parts:
            ours.symmetric(a, i0), theirs.symmetric(b, i0)
            same(a, b)
        same(ours.state.dlogit, theirs.state.dlogit)


NEEDS = [("z1",), ("z2",), ("temperature",), ("m",), ("weight",), ("z2", "temperature", "weight")]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("needs", NEEDS, ids="+".join)
def test_only_the_gradients_asked_for(symmetric, needs, device):
    def gradients(which: tuple[str, ...], name: str) -> dict[str, torch.Tensor | None]:
        g = torch.Generator().manual_seed(3)
        leaves = {
            "z1": torch.randn(18, 24, generator=g).to(device),
            "z2": torch.randn(18, 24, generator=g).to(device),
            "temperature": torch.tensor(0.07, device=device),
            "m": torch.tensor(0.2, device=device),
            "weight": torch.rand(18, generator=g).to(device),
        }
        for leaf in which:
            leaves[leaf].requires_grad_()
        fused_focal_infonce(backend=name, symmetric=symmetric, **leaves).backward()
        return {leaf: tensor.grad for leaf, tensor in leaves.items()}

    every = gradients(("z1", "z2", "temperature", "m", "weight"), "reference")
    for leaf, grad in gradients(needs, "triton").items():
        assert (grad is not None) == (leaf in needs)
        if grad is not None:
            torch.testing.assert_close(grad, every[leaf], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"exclude_above": 0.1}, {"symmetric": True}], ids=str)
def test_forward_alone_gives_the_same_loss(options, device):
    z1, z2 = (torch.randn(21, 40, device=device) for _ in range(2))
    with torch.no_grad():
        alone = fused_focal_infonce(z1, z2, backend="triton", **options)
    full = fused_focal_infonce(z1.requires_grad_(), z2, backend="triton", **options)
    torch.testing.assert_close(alone, full, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_temperature_and_m_are_read_by_the_kernels(symmetric, device):
    N = 20 if symmetric else 33
    numbers = problem(device, N=N, symmetric=symmetric)
    expected = triton_backend.contrastive(numbers)
    needs = Needs(True, True, True, True)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tau, m = torch.tensor(0.0625, dtype=dtype, device=device), torch.tensor(0.25, dtype=dtype, device=device)
        actual = triton_backend.contrastive(dataclasses.replace(numbers, temperature=tau, m=m, needs=needs))
        expected = triton_backend.contrastive(dataclasses.replace(numbers, temperature=0.0625, m=0.25))
        for name in ("rows", "dz1", "dz2"):
            torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
        assert actual.dtemperature.isfinite() and actual.dm.isfinite()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_impossible_temperature_gives_nan(tau, symmetric, device):
    p = problem(device, 9, 9, temperature=torch.tensor(tau, device=device), symmetric=symmetric)
    assert triton_backend.contrastive(p).rows.isnan().all()


@pytest.mark.parametrize("exclude", [None, 0.5])
def test_positive_out_of_range_gives_a_nan_row(exclude, device):
    positives = torch.arange(20)
    positives[3], positives[7], positives[8] = 33, -1, 1 << 40
    for needs in (Needs(), Needs(True, True)):
        p = problem(device, positives=positives.to(device), exclude_above=exclude, needs=needs)
        bad = triton_backend.contrastive(p).rows.isnan().cpu()
        assert bad.nonzero().flatten().tolist() == [3, 7, 8]


@pytest.mark.parametrize("options", [{}, {"exclude_above": 0.1}, {"temperature": 0.01}, {"symmetric": True}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_give_nan(value, options, device):
    z1, z2 = (torch.randn(9, 16, device=device) for _ in range(2))
    z2[3, 5] = value
    loss = fused_focal_infonce(z1.requires_grad_(), z2, backend="triton", **options)
    loss.backward()
    assert loss.isnan()


@pytest.mark.parametrize("scale", [1e-11, 1e-6, 1e15, 1e19, 1e25, 1e37])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.01}, {"symmetric": True}], ids=str)
def test_extreme_norms(scale, options, device):
    g = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(12, 8, generator=g, dtype=torch.float64) for _ in range(2))
    results = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, "triton")):
        a, b = ((z * scale).to(dtype).to(device).requires_grad_() for z in (z1, z2))
        loss = fused_focal_infonce(a, b, backend=name, **options)
        loss.backward()
        results.append((loss.detach(), a.grad.double() * scale, b.grad.double() * scale))
    truth, actual = results
    torch.testing.assert_close(actual[0], truth[0].float(), rtol=1e-5, atol=0)
    if scale < 1e30:  # beyond, gradients are denormal
        for x, y in zip(actual[1:], truth[1:]):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("options", [{}, {"exclude_above": 1.5}, {"symmetric": True}], ids=str)
def test_confident_rows_keep_their_digits(dtype, options, device):
    """p -> 1: the loss is about 1e-8 a row, where log Z - l keeps no digit in float32."""
    g = torch.Generator().manual_seed(0)
    z = (
        torch.nn.functional.normalize(torch.randn(64, 256, generator=g, dtype=torch.float64), dim=1)
        .to(dtype)
        .to(device)
    )
    results = []
    for wide, name in ((torch.float64, "reference"), (dtype, "triton")):
        a = z.to(wide, copy=True).requires_grad_()
        loss = fused_focal_infonce(a, z.to(wide), backend=name, **options)
        loss.backward()
        results.append((loss.detach().double(), a.grad.double()))
    (exact, gradient), (loss, actual) = results
    loose = 1 if dtype == torch.float32 else 1000  # one rounding of a cosine is a few percent of exp(l)
    assert 0 < exact < 1e-4
    torch.testing.assert_close(loss, exact, rtol=1e-4 * loose, atol=0)
    assert (actual - gradient).norm() < (5e-3 if dtype == torch.float32 else 0.05) * gradient.norm()


def test_rows_need_not_be_contiguous(device):
    base = torch.randn(64, 60, generator=torch.Generator().manual_seed(0)).to(device)
    for z1, z2 in ((base[::3], base[::2]), (base[:20, 5:37], base[20:50, 3:35]), (base[:1].expand(5, 60), base[:9])):
        results = []
        for a, b in ((z1, z2), (z1.contiguous(), z2.contiguous())):
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            loss = fused_focal_infonce(a, b, backend="triton")
            loss.backward()
            results.append((loss.detach(), a.grad, b.grad))
        for x, y in zip(*results):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


CALLS = [{}, {"exclude_above": 0.1}, {"symmetric": True}, {"temperature": 0.01, "hard_negative_weight": 1.0}]


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.clean_memory
def test_no_wait_for_the_device(options, cuda):
    N = 128 if "hard_negative_weight" in options else 64
    z1, z2 = (torch.randn(n, 64, device=cuda, dtype=torch.bfloat16, requires_grad=True) for n in (64, N))
    tau = torch.tensor(0.05, device=cuda, requires_grad=True)
    options = {"temperature": tau, **options}
    fused_focal_infonce(z1, z2, backend="triton", **options).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_focal_infonce(z1, z2, backend="triton", **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.clean_memory
def test_cuda_graph(options, cuda):
    N = 128 if "hard_negative_weight" in options else 64
    z1, z2 = (torch.randn(n, 64, device=cuda, dtype=torch.bfloat16, requires_grad=True) for n in (64, N))

    def step() -> torch.Tensor:
        z1.grad = z2.grad = None
        loss = fused_focal_infonce(z1, z2, backend="triton", **options)
        loss.backward()
        return loss

    replay = capture(step)
    captured = z1.grad, z2.grad
    with torch.no_grad():
        z1.copy_(torch.randn_like(z1))
    replayed = replay().detach().clone(), captured[0].clone(), captured[1].clone()
    eager = step().detach()
    for x, y in zip(replayed, (eager, z1.grad, z2.grad)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("options", [{}, {"exclude_above": 2.5}], ids=str)
@pytest.mark.clean_memory
def test_more_than_2_31_elements(options, cuda, monkeypatch):
    """c N and N D beyond 32-bit indices; the last row's gradient is that of the row alone."""
    B, N, D = 1024, 2_900_000, 768
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: B)
    free = torch.cuda.mem_get_info()[0]
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free >> 30} are free")
    z1 = torch.randn(B, D, device=cuda, dtype=torch.bfloat16)
    z2 = torch.randn(N, D, device=cuda, dtype=torch.bfloat16)
    positives = torch.full((B,), N - 1, device=cuda)
    z1[-1] = z2[-1] + z1[-1]
    full = z1.clone().requires_grad_()
    fused_focal_infonce(full, z2, positives=positives, reduction="sum", backend="triton", **options).backward()
    row = z1[-1:].clone().requires_grad_()
    fused_focal_infonce(row, z2, positives=positives[-1:], backend="reference", **options).backward()
    assert (full.grad[-1] - row.grad[0]).norm() < 0.03 * row.grad.norm()
