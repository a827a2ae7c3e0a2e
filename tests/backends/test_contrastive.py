"""Every CPU backend against the float64 reference, over the table in cases.py and every route through the code."""

from __future__ import annotations

import instruction_sets
import pytest
import torch

from pycse import fused_focal_infonce
from pycse.backends.cpu import contrastive as cpu
from pycse.panels import contrastive as panel

import cases
from oracle import Case, check, run

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_torch_backend(case, dtype):
    check(case, "torch", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_cpu_backend(case, dtype):
    check(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_cpu_backend_in_panels_of_13_rows(case, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", {})
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    check(case, "cpu", dtype)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_torch_backend_in_panels_of_13_rows(case, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    check(case, "torch", torch.float64)


@pytest.mark.parametrize("case", [Case(37, 111, 64, options={"hard_negative_weight": 0.5}),
                                  Case(37, D=64, options={"symmetric": True, "exclude_above": 0.1})], ids=str)  # fmt: skip
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("small", [True, False])
def test_result_does_not_depend_on_the_number_of_threads(threads, small, case, monkeypatch):
    if not small:
        monkeypatch.setattr(cpu, "SMALL", {})
    before = torch.get_num_threads()
    one = _with_threads(1, case)
    many = _with_threads(threads, case)
    torch.set_num_threads(before)
    for name in one.values:
        torch.testing.assert_close(one.values[name], many.values[name], rtol=2e-6, atol=1e-9)


def _with_threads(n, case):
    torch.set_num_threads(n)
    return run(case, "cpu", torch.float32)


@pytest.mark.parametrize("case", [Case(70, 150, 96), Case(70, D=96, options={"symmetric": True})], ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("small", [True, False])
def test_same_call_same_bits(backend, small, case, monkeypatch):
    if not small:
        monkeypatch.setattr(cpu, "SMALL", {})
    first, second = (run(case, backend, torch.float32) for _ in range(2))
    for name in first.values:
        assert torch.equal(first.values[name], second.values[name])


NEEDS = [("z1",), ("z2",), ("temperature",), ("m",), ("weight",), ("z1", "m"), ("z2", "temperature", "weight")]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("route", ["small", "panels", "symmetric", "none"])
@pytest.mark.parametrize("needs", NEEDS, ids="+".join)
def test_only_the_gradients_asked_for(backend, route, needs, monkeypatch):
    if route == "panels":
        monkeypatch.setattr(cpu, "SMALL", {})
        monkeypatch.setattr(panel, "panel_rows", lambda B, *_: 7)
    g = torch.Generator().manual_seed(3)
    options = {"symmetric": route == "symmetric", "reduction": "none" if route == "none" else "mean"}

    def gradients(which, name):
        g.manual_seed(3)
        leaves = {
            "z1": torch.randn(18, 24, generator=g),
            "z2": torch.randn(18, 24, generator=g),
            "temperature": torch.tensor(0.07),
            "m": torch.tensor(0.2),
            "weight": torch.rand(18, generator=g),
        }
        for leaf in which:
            leaves[leaf].requires_grad_()
        loss = fused_focal_infonce(backend=name, **leaves, **options)
        loss.sum().backward()
        return {leaf: tensor.grad for leaf, tensor in leaves.items()}

    every = gradients(tuple(every_leaf for every_leaf in ("z1", "z2", "temperature", "m", "weight")), "reference")
    some = gradients(needs, backend)
    for leaf, grad in some.items():
        assert (grad is not None) == (leaf in needs)
        if grad is not None:
            torch.testing.assert_close(grad, every[leaf], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_inputs_need_not_be_contiguous(backend):
    g = torch.Generator().manual_seed(0)
    base1, base2 = torch.randn(40, 21, generator=g), torch.randn(64, 60, generator=g)
    views = {
        "transposed": (base1.t(), base2[:40].t()[:21].reshape(21, 40)),
        "strided columns": (base2[:20, ::2], base2[20:50, ::2]),
        "strided rows": (base2[::3], base2[::2]),
        "expanded": (base2[:1].expand(5, 60), base2[:9]),
    }
    for name, (z1, z2) in views.items():
        results = []
        for a, b in ((z1, z2), (z1.contiguous(), z2.contiguous())):
            a, b = a.detach(), b.detach()
            a.requires_grad_(), b.requires_grad_()
            loss = fused_focal_infonce(a, b, backend=backend)
            loss.backward()
            results.append((loss.detach(), a.grad, b.grad))
        for x, y in zip(*results):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_same_tensor_on_both_sides(backend):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20, 16, generator=g, dtype=torch.float64)
    a = z.clone().requires_grad_()
    fused_focal_infonce(a, a, backend=backend).backward()
    b, c = z.clone().requires_grad_(), z.clone().requires_grad_()
    fused_focal_infonce(b, c, backend="reference").backward()
    torch.testing.assert_close(a.grad, b.grad + c.grad)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("B", [9, 400])
def test_nan_and_infinity_give_nan(backend, bad, symmetric, B):
    z1, z2 = torch.randn(B, 16), torch.randn(B, 16)
    z2[3, 5] = bad
    z1.requires_grad_()
    loss = fused_focal_infonce(z1, z2, symmetric=symmetric, backend=backend)
    loss.backward()
    assert loss.isnan()


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_zero_vectors_get_zero_gradient(backend):
    z1, z2 = torch.randn(6, 8), torch.randn(9, 8)
    z1[2], z2[4], z2[8] = 0, 0, 1e-13
    z1.requires_grad_(), z2.requires_grad_()
    loss = fused_focal_infonce(z1, z2, backend=backend)
    loss.backward()
    assert loss.isfinite() and z1.grad.isfinite().all() and z2.grad.isfinite().all()
    assert not z1.grad[2].any() and not z2.grad[4].any() and not z2.grad[8].any()
    assert z1.grad[1].any() and z2.grad[1].any()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("scale", [1e-11, 1e-6, 1e15, 1e25, 1e37])
def test_extreme_norms(backend, scale):
    g = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(12, 8, generator=g), torch.randn(12, 8, generator=g)
    truth, a, b = _gradients(z1.double() * scale, z2.double() * scale, "reference")
    loss, da, db = _gradients(z1 * scale, z2 * scale, backend)
    torch.testing.assert_close(loss, truth.float(), rtol=1e-5, atol=0)
    if scale < 1e30:  # beyond, gradients are denormal
        torch.testing.assert_close(da * scale, (a * scale).float(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(db * scale, (b * scale).float(), rtol=1e-3, atol=1e-6)


def _gradients(z1, z2, backend):
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    loss = fused_focal_infonce(z1, z2, backend=backend)
    loss.backward()
    return loss.detach(), z1.grad, z2.grad


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_confident_rows_keep_their_digits(backend):
    """p -> 1: the loss is about 1e-8 a row, where log Z - l keeps no digit in float32."""
    g = torch.Generator().manual_seed(0)
    z1 = torch.nn.functional.normalize(torch.randn(64, 256, generator=g, dtype=torch.float64), dim=1)
    exact, a, _ = _gradients(z1, z1.clone(), "reference")
    loss, da, _ = _gradients(z1.float(), z1.float(), backend)
    assert 0 < exact < 1e-4
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(da.double(), a, rtol=1e-2, atol=1e-3 * a.abs().max().item())


@instruction_sets.each
def test_every_instruction_set(isa, tmp_path):
    code = """
import torch, cases, oracle
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for case in cases.ALL: oracle.check(case, 'cpu', dtype)
"""
    instruction_sets.run_with(isa, tmp_path, code)
