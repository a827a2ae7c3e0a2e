"""The supervised contrastive loss: every CPU backend against the float64 reference, and the reference against published
code."""

from __future__ import annotations

import math
from typing import Any

import instruction_sets
import labelled
import pytest
import torch
from labelled import WEIGHTS, Labelled, check, run
from torch import Tensor

from pycse import backends, fused_supcon
from pycse.losses import SupConLoss
from pycse.ops.supervised import supervised as fused
from pycse.panels import contrastive as panel
from pycse.problem import Supervised

from oracle import Case

BACKENDS = ["torch", "cpu"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("inside", [False, True], ids=["out", "in"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", labelled.ALL, ids=str)
def test_backends(case, backend, dtype, inside):
    check(case, inside, backend, dtype)


@pytest.mark.parametrize("inside", [False, True], ids=["out", "in"])
@pytest.mark.parametrize("backend, dtype", [("cpu", torch.float32), ("cpu", torch.bfloat16), ("torch", torch.float64)])
@pytest.mark.parametrize("case", labelled.ALL, ids=str)
def test_panels_of_13_rows(case, backend, dtype, inside, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    check(case, inside, backend, dtype)


@instruction_sets.each
def test_every_instruction_set(isa, tmp_path):
    code = "import torch, labelled\nlabelled.check_all('cpu', torch.float32, torch.bfloat16, torch.float64)"
    instruction_sets.run_with(isa, tmp_path, code)


def published(z: Tensor, ids: Tensor, temperature: float, keys: Tensor | None = None, key_ids: Tensor | None = None):
    """SupConLoss of pytorch-metric-learning 2.9 as it stands there: masks, a row's maximum, its logsumexp and mean."""
    keys, key_ids = (z, ids) if keys is None else (keys, key_ids)
    unit = torch.nn.functional.normalize
    mat = unit(z, dim=1) @ unit(keys, dim=1).t() / temperature
    pos_mask = (ids[:, None] == key_ids[None]).double()
    neg_mask = 1 - pos_mask
    if keys is z:
        pos_mask.fill_diagonal_(0)
    mat = mat - mat.max(dim=1, keepdim=True)[0].detach()
    kept = (pos_mask + neg_mask).bool()
    denominator = mat.masked_fill(~kept, torch.finfo(mat.dtype).min).logsumexp(1, keepdim=True)
    log_prob = mat - denominator
    return -((pos_mask * log_prob).sum(1) / (pos_mask.sum(1) + torch.finfo(mat.dtype).tiny))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("N", [None, 40])
def test_as_published(N, backend):
    z1, ids1, z2, ids2 = Labelled(24, N).tensors(torch.float64)
    rows = fused_supcon(z1, ids1, z2, ids2, 0.1, reduction="none", backend=backend)
    torch.testing.assert_close(rows, published(z1, ids1, 0.1, z2, ids2))
    loss = fused_supcon(z1, ids1, z2, ids2, 0.1, backend=backend)
    torch.testing.assert_close(loss, rows.mean())


def test_as_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")
    for N in (None, 40):
        z1, ids1, z2, ids2 = Labelled(24, N, ids="pairs").tensors(torch.float64)
        theirs = losses.SupConLoss(0.1)(z1, ids1, ref_emb=z2, ref_labels=ids2)
        torch.testing.assert_close(fused_supcon(z1, ids1, z2, ids2, 0.1), theirs)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("inside", [False, True])
def test_closed_forms(inside, backend):
    options: dict[str, Any] = dict(inside=inside, backend=backend)
    eye = torch.eye(6, dtype=torch.float64)
    clusters, ids = eye[[0, 0, 0, 1, 1, 1]], torch.tensor([4, 4, 4, 9, 9, 9])
    near = pytest.approx
    assert fused_supcon(clusters, ids, temperature=0.5, **options).item() == near(math.log(2 + 3 * math.exp(-2)))
    assert fused_supcon(clusters, ids[[0, 3, 0, 3, 0, 3]] * 0, temperature=0.5, **options).item() > math.log(5) - 1e-12
    assert fused_supcon(eye, torch.zeros(6).long(), **options).item() == near(math.log(5))
    assert fused_supcon(eye, torch.arange(6), **options).item() == 0
    # one positive: both variants are InfoNCE
    z1, z2 = Case(9, 20, 8).embeddings()
    from pycse import fused_infonce

    expected = fused_infonce(z1, z2, 0.07, backend="reference")
    actual = fused_supcon(z1, torch.arange(9), z2, torch.arange(20), 0.07, **options)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_confident_rows_keep_their_digits(n, inside, backend):
    """p -> 1/n: what is left of gradient and loss (beyond log n) is about 1e-8, where 1/n - p keeps no digit in
    float32."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(64, 256, generator=g, dtype=torch.float64)
    keys, ids = z.repeat(n, 1), torch.arange(64)  # positives equally near
    results = []
    for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
        a, k = (x.to(dtype, copy=True).requires_grad_() for x in (z, keys))
        rows = fused_supcon(a, ids, k, ids.repeat(n), inside=inside, reduction="none", backend=name)
        rows.sum().backward()
        results.append((rows.detach().double(), a.grad.double(), k.grad.double()))
    (exact, *truth), (rows, *gradients) = results
    assert (exact - math.log(n)).max() < 1e-4
    torch.testing.assert_close(rows, exact, rtol=1e-4 if n == 1 else 1e-6, atol=0)
    for t, x in zip(truth, gradients):
        assert 0 < t.norm() < 1e-3
        assert (x - t).norm() < 1e-3 * t.norm()


NEEDS = [("z1",), ("z2",), ("temperature",), ("weight",), ("z1", "temperature"), ("z2", "weight")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", NEEDS, ids="+".join)
def test_only_the_gradients_asked_for(backend, reduction, needs, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: 7)
    z1, ids1, z2, ids2 = Labelled(18, 30).tensors(torch.float32)

    def gradients(which, name):
        leaves = {"z1": z1.float(), "z2": z2.float(), "temperature": torch.tensor(0.07), "weight": torch.ones(18)}
        leaves = {k: t.clone().requires_grad_(k in which) for k, t in leaves.items()}
        fused_supcon(ids1=ids1, ids2=ids2, reduction=reduction, backend=name, **leaves).sum().backward()
        return {k: t.grad for k, t in leaves.items()}

    every = gradients(("z1", "z2", "temperature", "weight"), "reference")
    for leaf, grad in gradients(needs, backend).items():
        assert (grad is not None) == (leaf in needs)
        if grad is not None:
            torch.testing.assert_close(grad, every[leaf], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend):
    g = torch.Generator().manual_seed(0)
    base, ids = torch.randn(64, 60, generator=g), torch.randint(0, 5, (2, 64), generator=g).t()
    for z1, z2, k in ((base[::2, ::3], None, ids[:32, 0]), (base.t()[:20], base.t()[20:50], ids[:20, 1])):
        id2 = None if z2 is None else ids[::2, 0][:30]
        results = []
        for copy in (False, True):
            given = [t.contiguous() if copy and t is not None else t for t in (z1, k, z2, id2)]
            leaves = [None if t is None else t.detach().requires_grad_() for t in given[::2]]
            loss = fused_supcon(leaves[0], given[1], leaves[1], given[3], backend=backend)
            loss.backward()
            results.append((loss.detach(), *(t.grad for t in leaves if t is not None)))
        for x, y in zip(*results):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_of_any_integer_type(backend):
    z, ids = Labelled(20, ids="pairs").tensors(torch.float64)[:2]
    expected = fused_supcon(z, ids, backend=backend)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(fused_supcon(z, ids.to(dtype), backend=backend), expected)
    assert torch.equal(fused_supcon(z, -ids * 2**50, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inside", [False, True])
def test_rows_without_positives(inside, backend):
    """Loss 0 and gradient 0, and they count in the mean."""
    z1, _, z2, _ = Labelled(6, 9).tensors(torch.float64)
    ids1, ids2 = torch.tensor([0, 1, 2, 0, 5, 1]), torch.tensor([0, 1, 0, 1, 1, 7, 7, 0, 1])
    z1.requires_grad_()
    rows = fused_supcon(z1, ids1, z2, ids2, inside=inside, reduction="none", backend=backend)
    assert rows[2] == rows[4] == 0 and rows[0] > 0
    loss = fused_supcon(z1, ids1, z2, ids2, inside=inside, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss, rows.sum() / 6)
    assert not z1.grad[2].any() and not z1.grad[4].any() and z1.grad[0].any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_nan_and_infinity_give_nan(backend, bad, inside, temperature):
    z = torch.randn(20, 16)
    z[3, 5] = bad
    z.requires_grad_()
    loss = fused_supcon(z, torch.arange(20) // 2, temperature=temperature, inside=inside, backend=backend)
    loss.backward()
    assert loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [None, 150])
def test_same_call_same_bits_whatever_the_threads(backend, N):
    before = torch.get_num_threads()
    case = Labelled(70, N, 96, trained=True)
    first, second = (run(case, False, backend, torch.float32) for _ in range(2))
    torch.set_num_threads(1)
    alone = run(case, False, backend, torch.float32)
    torch.set_num_threads(before)
    for name, value in first.values.items():
        assert torch.equal(value, second.values[name])
        torch.testing.assert_close(value, alone.values[name], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("inside", [False, True])
def test_reference_gradcheck(inside):
    z1, ids1, z2, ids2 = Labelled(5, 7, 4, "pairs").tensors(torch.float64)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    z1.requires_grad_(), z2.requires_grad_()
    call = lambda z1, z2, t: fused_supcon(z1, ids1, z2, ids2, t, inside=inside, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, (z1, z2, tau))
    assert torch.autograd.gradgradcheck(call, (z1, z2, tau))
    alone = lambda z: fused_supcon(z, ids1, temperature=0.3, inside=inside, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(alone, z1)


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [None, 20])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(backend, N, reduction):
    z1, ids1, z2, ids2 = Labelled(12, N, 16).tensors(torch.float32)
    z1 = z1.float().requires_grad_()
    z2 = None if z2 is None else z2.float().requires_grad_()
    tau, weight = torch.tensor(0.07, requires_grad=True), torch.rand(12).requires_grad_()
    p = Supervised(z1, z2, tau, weight, ids1, ids2, reduction=reduction)
    torch.library.opcheck(fused.op, (*fused.arguments.flat(p, backend=backend, validate=False), [False] * 4))


@pytest.mark.clean_memory
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    torch._dynamo.reset()
    module = SupConLoss(torch.nn.Parameter(torch.tensor(0.1)), inside=True)

    def step(z, ids):
        return module(z * 2, ids) + fused_supcon(z * 3, ids, z.detach(), ids)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B in (12, 9):
        z, ids = Labelled(B, ids="pairs").tensors(torch.float32)[:2]
        results = []
        for function in (step, compiled):
            leaf = z.float().requires_grad_()
            loss = function(leaf, ids)
            results.append((loss.detach(), *torch.autograd.grad(loss, (leaf, module.temperature))))
        for eager, traced in zip(*results):
            torch.testing.assert_close(traced, eager)


def test_autocast():
    z, ids = Labelled(20, ids="pairs").tensors(torch.float32)[:2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = fused_supcon(z.float(), ids)
    assert low.dtype == torch.float32 and torch.equal(low, fused_supcon(z.bfloat16(), ids))


def test_module():
    z1, ids1, z2, ids2 = Labelled(20, 30).tensors(torch.float64)
    module = SupConLoss(0.07, inside=True, reduction="sum")
    expected = fused_supcon(z1, ids1, z2, ids2, 0.07, inside=True, reduction="sum", weight=WEIGHTS)
    assert torch.equal(module(z1, ids1, z2, ids2, weight=WEIGHTS), expected)
    assert "inside=True" in repr(module) and "temperature=0.07" in repr(module)
    assert set(SupConLoss(torch.nn.Parameter(torch.tensor(0.1))).state_dict()) == {"temperature"}
    with pytest.raises(TypeError, match="'ids1' belongs to a batch"):
        SupConLoss(ids1=ids1)


def test_a_backend_without_kernels_says_so(monkeypatch):
    z = torch.randn(6, 4)
    with pytest.raises(
        RuntimeError, match="backend='cuda' cannot run here: it has no kernels for the op 'supervised'; .*triton"
    ):
        fused_supcon(z, torch.arange(6) // 2, backend="cuda")
    monkeypatch.setattr(backends, "unusable", lambda name: None)
    assert backends._auto.__wrapped__("cuda", "supervised") == "triton"


X, IDS8 = torch.randn(8, 4), torch.arange(8) // 2
BAD = [
    (lambda: fused_supcon(X[0], IDS8), ValueError, "z1 must have 2 dimensions"),
    (lambda: fused_supcon(X, None), TypeError, r"ids1 must be an integer tensor of shape \(8,\), got None"),
    (lambda: fused_supcon(X, [1, 2]), TypeError, r"ids1 must be a tensor of shape \(8,\)"),
    (lambda: fused_supcon(X, IDS8[:7]), ValueError, r"ids1 must have shape \(8,\), got \(7,\)"),
    (lambda: fused_supcon(X, IDS8.float()), TypeError, "ids1 must be an integer tensor, got torch.float32"),
    (lambda: fused_supcon(X, IDS8 > 2), TypeError, "ids1 must be an integer tensor, got torch.bool"),
    (lambda: fused_supcon(X, IDS8, X), ValueError, "ids2 must be given together with z2"),
    (lambda: fused_supcon(X, IDS8, None, IDS8), ValueError, "z2 must be given together with ids2"),
    (lambda: fused_supcon(X, IDS8, X[:3], IDS8), ValueError, r"ids2 must have shape \(3,\), got \(8,\)"),
    (lambda: fused_supcon(X, IDS8, X, IDS8.double()), TypeError, "ids2 must be an integer tensor"),
    (lambda: fused_supcon(X, IDS8, X[:, :3], IDS8), ValueError, r"z2 must have z1's 4 features, got shape \(8, 3\)"),
    (lambda: fused_supcon(X, IDS8, X.double(), IDS8), TypeError, "z2 must have z1's dtype torch.float32"),
    (lambda: fused_supcon(X, IDS8, X.to("meta"), IDS8), ValueError, "z2 must be on z1's device"),
    (lambda: fused_supcon(X, IDS8.to("meta")), ValueError, "ids1 must be on z1's device"),
    (lambda: fused_supcon(X, IDS8, temperature=0), ValueError, "temperature must be a finite number > 0, got 0"),
    (lambda: fused_supcon(X, IDS8, temperature=1e-7), ValueError, "temperature must be at least 1e-06"),
    (
        lambda: fused_supcon(X, IDS8, temperature=torch.tensor(-1.0)),
        ValueError,
        "temperature must be a finite number > 0",
    ),
    (lambda: fused_supcon(X, IDS8, temperature=torch.tensor(1e-7)), ValueError, "temperature must be at least 1e-06"),
    (lambda: fused_supcon(X, IDS8, inside=1), TypeError, "inside must be True or False"),
    (lambda: fused_supcon(X, IDS8, normalize=None), TypeError, "normalize must be True or False"),
    (lambda: fused_supcon(X, IDS8, weight=torch.ones(7)), ValueError, r"weight must have shape \(8,\)"),
    (lambda: fused_supcon(X, IDS8, reduction="max"), ValueError, "reduction must be one of"),
    (lambda: fused_supcon(X, IDS8, backend="gpu"), ValueError, "backend must be one of.*'gpu'"),
    (lambda: SupConLoss(inside="yes"), TypeError, "inside must be True or False"),
    (lambda: SupConLoss(m=0.3), TypeError, "option 'm' is none of temperature, inside"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
