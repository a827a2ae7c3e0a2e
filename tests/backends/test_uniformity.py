"""Alignment and uniformity: closed forms, and every backend that runs here against the float64 reference.

The CUDA kernel's body runs on one host thread; tests/backends/triton/test_triton_uniformity.py has the Triton backend.
"""

from __future__ import annotations

import math

import emulation
import instruction_sets
import pytest
import torch

from pycse import alignment, fused_infonce, uniformity
from pycse.backends.cuda import norms
from pycse.backends.cuda import uniformity as cuda
from pycse.backends.torch import uniformity as plain
from pycse.ops.uniformity import alignment_op, uniformity_op
from pycse.panels import alignment as pairs
from pycse.panels import uniformity as panel

from oracle import BAND

BACKENDS = ["torch", "cpu", "emulated"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def emulated(monkeypatch, request):
    """backend="torch" runs the emulated CUDA kernels for the tests of "emulated"."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "emulated":
        monkeypatch.setattr(norms.Norms, "native", staticmethod(emulation.kernels))
        monkeypatch.setattr(plain, "uniformity", cuda.uniformity)
        monkeypatch.setattr(plain, "alignment", cuda.alignment)


def named(backend: str) -> str:
    return "torch" if backend == "emulated" else backend


def points(N: int, D: int = 24, kind: str = "random", seed: int = 0) -> torch.Tensor:
    z = torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "zeros":
        z[::3] = 0
    if kind == "equal":
        z[:] = z[0].clone()
    if kind == "duplicates":
        z[1::2] = z[: N - 1 : 2][: len(z[1::2])]
    if kind == "scales":
        z *= 10 ** torch.linspace(-8, 8, N, dtype=torch.float64)[:, None]
    if kind == "far":  # every pair but one far apart, for sharp potentials
        z[1] = z[0] + 1e-3 * z[1]
    return z


def run(loss, *zs: torch.Tensor, upstream: float = 1.5) -> list[torch.Tensor]:
    leaves = [z.detach().clone().requires_grad_() for z in zs]
    value = loss(*leaves)
    (value * upstream).backward()
    return [value.detach().double(), *(z.grad.double() for z in leaves)]


def check(loss, backend: str, dtype: torch.dtype, *zs: torch.Tensor, floor: float = 0.1) -> None:
    """Budget: twice the error of the reference in ``dtype``, plus a band. ``loss(backend)`` takes the embeddings.

    What vanishes leaves the rounding of what cancelled, about 4 t eps: below ``floor`` errors count absolutely.
    """
    zs = tuple(z.to(dtype) for z in zs)
    truth = run(loss("reference"), *(z.double() for z in zs))
    eager = run(loss("reference"), *(z.float() if dtype == torch.float16 else z for z in zs))
    ours = run(loss(named(backend)), *zs)
    for t, e, o in zip(truth, eager, ours):
        scale = t.norm().clamp_min(floor)
        off, allowed = (o - t).norm() / scale, 2 * (e - t).norm() / scale + BAND[dtype]
        assert torch.isfinite(o).all()
        assert off <= allowed, f"off by {off:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0.5, 2.0, 40.0])
@pytest.mark.parametrize("N", [2, 3, 17, 64, 131])
def test_uniformity(N, t, dtype, backend):
    if t == 40.0 and dtype in (torch.bfloat16, torch.float16):
        t = 5.0  # 2^-9 of a similarity times 80 is no potential any more
    check(lambda b: lambda z: uniformity(z, t, backend=b), backend, dtype, points(N))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_panels_of_13_rows(normalize, dtype, backend, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda p, *_: min(p.z.shape[0], 13))
    monkeypatch.setattr(pairs, "PANEL_BYTES", 13 * 24 * (8 if dtype == torch.float64 else 4))
    z = points(70) / (1 if normalize else 4)
    check(lambda b: lambda z: uniformity(z, normalize=normalize, backend=b), backend, dtype, z)
    check(lambda b: lambda x, y: alignment(x, y, normalize=normalize, backend=b), backend, dtype, z, points(70, seed=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [2.0, 100.0])
@pytest.mark.parametrize("kind", ["zeros", "equal", "duplicates", "scales", "far"])
def test_hostile(kind, t, backend):
    z = points(34, kind=kind)
    check(lambda b: lambda z: uniformity(z, t, backend=b), backend, torch.float64, z, floor=t)
    check(lambda b: lambda x, y: alignment(x, y, backend=b), backend, torch.float64, z, z.flip(0))
    if kind != "scales":
        check(lambda b: lambda z: uniformity(z, t, normalize=False, backend=b), backend, torch.float64, z, floor=24 * t)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, D", [(1, 1), (1, 5), (2, 33), (65, 24), (500, 7)])
def test_alignment(B, D, dtype, backend):
    x = points(B, D)
    check(lambda b: lambda x, y: alignment(x, y, backend=b), backend, dtype, x, x + 0.1 * points(B, D, seed=1))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_closed_forms(backend):
    """Orthogonal, identical, opposite and two-cluster inputs."""
    b = named(backend)
    eye = torch.eye(8, dtype=torch.float64)
    near = lambda x: pytest.approx(x, rel=1e-12, abs=1e-12)  # noqa: E731
    assert uniformity(3 * eye, backend=b).item() == near(-4)  # all distances 2, t = 2
    assert uniformity(3 * eye, 30.0, backend=b).item() == near(-60)
    assert uniformity(torch.ones(5, 3, dtype=torch.float64), backend=b).item() == near(0)
    clusters = eye[[0, 0, 0, 1, 1, 1]]  # 6 pairs of 15 coincide, 9 are orthogonal
    assert uniformity(clusters, backend=b).item() == near(math.log((6 + 9 * math.exp(-4)) / 15))
    assert alignment(eye, 2 * eye, backend=b).item() == near(0)
    assert alignment(eye, -eye, backend=b).item() == near(4)
    assert alignment(eye, eye.roll(1, 0), backend=b).item() == near(2)


def test_as_published():
    """The code of the paper's appendix, on unit rows."""
    x, y = (z / z.norm(dim=1, keepdim=True) for z in (points(40), points(40, seed=1)))
    torch.testing.assert_close(uniformity(x), torch.pdist(x).pow(2).mul(-2).exp().mean().log())
    torch.testing.assert_close(uniformity(x, normalize=False), uniformity(x))
    torch.testing.assert_close(alignment(x, y), (x - y).norm(dim=1).pow(2).mean())
    close = x + 1e-7 * y  # 2 - 2 s would leave no digit
    torch.testing.assert_close(alignment(x.float(), close.float()).item(), 0.0, atol=3e-13, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_rows_give_nan(bad, backend):
    z = points(20).float()
    z[3, 2] = bad
    assert uniformity(z, backend=named(backend)).isnan()
    assert alignment(z, points(20).float(), backend=named(backend)).isnan()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_only_the_gradients_asked_for(backend):
    x, y = points(30).requires_grad_(), points(30, seed=1)
    alignment(x, y, backend=backend).backward()
    other = y.clone().requires_grad_()
    alignment(x.detach(), other, backend=backend).backward()
    both = [z.detach().clone().requires_grad_() for z in (x, y)]
    alignment(*both, backend=backend).backward()
    assert torch.equal(x.grad, both[0].grad) and torch.equal(other.grad, both[1].grad)
    same = x.detach().clone().requires_grad_()
    alignment(same, same, backend=backend).backward()
    assert same.grad.norm() < 1e-12
    with torch.no_grad():
        assert not uniformity(x, backend=backend).requires_grad


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_twice_and_non_contiguous(backend):
    z = points(24, 60)[:, ::2].requires_grad_()
    loss = uniformity(z, backend=backend)
    (once,) = torch.autograd.grad(loss, z, retain_graph=True)
    (again,) = torch.autograd.grad(2 * loss, z)
    torch.testing.assert_close(again, 2 * once)
    loss = uniformity(z, backend=backend) + fused_infonce(z, z.detach(), backend=backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="double backward"):
        (g,) = torch.autograd.grad(uniformity(z, backend=backend), z, create_graph=True)
        g.sum().backward()


def test_reference_gradcheck():
    z, y = points(5, 4).requires_grad_(), points(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: uniformity(z, backend="reference"), z)
    assert torch.autograd.gradcheck(lambda z: uniformity(z, normalize=False, backend="reference"), z)
    assert torch.autograd.gradcheck(lambda x, y: alignment(x, y, backend="reference"), (z, y))


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_operators(backend):
    x, y = points(12).float().requires_grad_(), points(12, seed=1).float().requires_grad_()
    torch.library.opcheck(uniformity_op.op, (x, None, 2.0, True, backend, [False]))
    torch.library.opcheck(alignment_op.op, (x, y, True, backend, [False, False]))


@pytest.mark.clean_memory
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    torch._dynamo.reset()

    def step(x, y):
        return alignment(x * 2, y) + uniformity(x * 3)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (12, 9):
        x, y = points(N).float(), points(N, seed=1).float()
        for eager, traced in zip(run(step, x, y), run(compiled, x, y)):
            torch.testing.assert_close(traced, eager)


def test_autocast():
    x, y = points(16).float(), points(16, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = uniformity(x), alignment(x, y)
    exact = uniformity(x.bfloat16()), alignment(x.bfloat16(), y.bfloat16())
    assert low[0].dtype == torch.float32 and torch.equal(low[0], exact[0]) and torch.equal(low[1], exact[1])


@instruction_sets.each
def test_every_instruction_set(isa, tmp_path):
    code = """
import torch
from pycse import uniformity
z = torch.randn(77, 24, generator=torch.Generator().manual_seed(0))
truth = uniformity(z.double(), backend="reference")
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    x = z.to(dtype, copy=True).requires_grad_()
    loss = uniformity(x, backend="cpu")
    loss.backward()
    assert abs(loss - truth) < 5e-2 and x.grad.isfinite().all(), (dtype, loss, truth)
    if dtype != torch.bfloat16:
        assert abs(loss - truth) < 1e-5, (dtype, loss, truth)
"""
    instruction_sets.run_with(isa, tmp_path, code)


X = torch.randn(8, 4)
BAD = [
    (lambda: uniformity(X[:1]), ValueError, "x must have at least 2 rows"),
    (lambda: uniformity(X[0]), ValueError, "x must have 2 dimensions"),
    (lambda: uniformity([1.0]), TypeError, "x must be a torch.Tensor"),
    (lambda: uniformity(X.long()), TypeError, "x must be float32.*int64"),
    (lambda: uniformity(X.to_sparse()), TypeError, "x must be a dense tensor, got torch.sparse_coo"),
    (lambda: uniformity(X, 0.0), ValueError, "t must be a finite number > 0, got 0.0"),
    (lambda: uniformity(X, math.nan), ValueError, "t must be a finite number > 0"),
    (lambda: uniformity(X, torch.tensor(2.0)), TypeError, "t must be a number"),
    (lambda: uniformity(X, normalize=1), TypeError, "normalize must be True or False"),
    (lambda: uniformity(X, backend="gpu"), ValueError, "backend must be one of.*'gpu'"),
    (lambda: alignment(X, X[:7]), ValueError, r"y must have x's shape \(8, 4\).*\(7, 4\)"),
    (lambda: alignment(X, X.double()), TypeError, "y must have x's dtype torch.float32, got torch.float64"),
    (lambda: alignment(X, X.to("meta")), ValueError, "y must be on x's device"),
    (lambda: alignment(X[:0], X[:0]), ValueError, "x must have at least one row"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
