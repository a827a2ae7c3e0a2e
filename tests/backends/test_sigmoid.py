"""The sigmoid loss: every CPU backend against the float64 reference, and the reference against published code."""

from __future__ import annotations

import copy
import math
from typing import Any

import instruction_sets
import pytest
import torch
import torch.nn.functional as F
from sigmoid_pairs import ALL, Pairs, check, ids, run
from torch import Tensor

from pycse import backends, fused_sigmoid
from pycse.losses import SigmoidLoss
from pycse.ops.sigmoid import sigmoid as fused
from pycse.panels import contrastive as panel
from pycse.problem import Sigmoid

BACKENDS = ["torch", "cpu"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_reference(backend, case, dtype):
    check(case, backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_panels_of_13_rows(backend, case, dtype, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda B, *_: min(B, 13))
    check(case, backend, dtype)


def published(z1: Tensor, z2: Tensor, scale: float, bias: float) -> Tensor:
    """As open_clip's SigLipLoss has it: labels of -1 with ones on the diagonal, summed and divided by the rows."""
    logits = scale * F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T + bias
    labels = 2 * torch.eye(len(z1), dtype=z1.dtype) - torch.ones(len(z1), dtype=z1.dtype)
    return -F.logsigmoid(labels * logits).sum() / len(z1)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (117.3, -12.9)])
def test_as_published(backend, scale, bias):
    z1, z2 = Pairs(30).embeddings(torch.float64)
    a, b = (z.clone().requires_grad_() for z in (z1, z2))
    published(a, b, scale, bias).backward()
    z1.requires_grad_(), z2.requires_grad_()
    loss = fused_sigmoid(z1, z2, scale, bias, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss, published(a, b, scale, bias), rtol=1e-12, atol=0)
    torch.testing.assert_close(z1.grad, a.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z2.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_closed_forms(backend):
    """Orthogonal rows: every negative has the logit ``bias``, every positive scale + bias."""
    eye = 3 * torch.eye(20, 24, dtype=torch.float64)
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    loss = fused_sigmoid(eye, eye, 12.0, -10.0, backend=backend)
    assert loss.item() == pytest.approx(softplus(-2) + 19 * softplus(-10), rel=1e-13)
    same = torch.zeros(20, dtype=torch.int64)
    loss = fused_sigmoid(eye, eye, 12.0, -10.0, query_ids=same, key_ids=same, backend=backend)
    assert loss.item() == pytest.approx(softplus(-2) + 19 * softplus(10), rel=1e-13)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_ids_of_single_keys_are_positives(backend):
    z1, z2 = Pairs(20, 47).embeddings(torch.float64)
    pos, order = torch.arange(20) * 2 + 3, torch.arange(47)
    by_key = fused_sigmoid(z1, z2, positives=pos, backend=backend)
    torch.testing.assert_close(fused_sigmoid(z1, z2, query_ids=pos, key_ids=order, backend=backend), by_key)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("bias", [-90.0, -40.0, -18.0])
def test_small_losses_keep_their_digits(backend, bias):
    """softplus(-40) is 4e-18: log(1 + u) would be 0 from u < 6e-8 on."""
    z1, z2 = (z.float() for z in Pairs(20, 40).embeddings(torch.float32))
    options = {"scale": 0.1, "bias": bias, "query_ids": torch.zeros(20).long(), "key_ids": torch.ones(40).long()}
    loss = fused_sigmoid(z1, z2, backend=backend, **options)
    exact = fused_sigmoid(z1.double(), z2.double(), backend="reference", **options)
    limit = 0 if bias < -87.4 else exact.item()  # below float32's smallest normal number: 0
    assert loss.item() == pytest.approx(limit, rel=2e-5, abs=2e-36)


NEEDS = [("z1",), ("z2",), ("scale",), ("bias",), ("weight",), ("z1", "bias"), ("z2", "scale", "weight")]
LEAVES = ("z1", "z2", "scale", "bias", "weight")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("needs", NEEDS, ids="+".join)
def test_only_the_gradients_asked_for(backend, reduction, with_ids, needs):
    options = {"reduction": reduction, **(ids(18, 30, 4) if with_ids else {})}

    def gradients(which, name):
        g = torch.Generator().manual_seed(3)
        leaves = {
            "z1": torch.randn(18, 24, generator=g),
            "z2": torch.randn(30, 24, generator=g),
            "scale": torch.tensor(7.0),
            "bias": torch.tensor(-2.0),
            "weight": torch.rand(18, generator=g),
        }
        for leaf in which:
            leaves[leaf].requires_grad_()
        fused_sigmoid(backend=name, **leaves, **options).sum().backward()
        return {leaf: tensor.grad for leaf, tensor in leaves.items()}

    every = gradients(LEAVES, "reference")
    for leaf, grad in gradients(needs, backend).items():
        assert (grad is not None) == (leaf in needs)
        if grad is not None:
            torch.testing.assert_close(grad, every[leaf], rtol=2e-4, atol=2e-5)


@instruction_sets.each
def test_every_instruction_set(isa, tmp_path):
    code = """
import torch
from sigmoid_pairs import ALL, check
for case in ALL:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check(case, "cpu", dtype)
"""
    instruction_sets.run_with(isa, tmp_path, code)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_the_number_of_threads(threads):
    before = torch.get_num_threads()
    results = []
    for n in (1, threads):
        torch.set_num_threads(n)
        results.append(run(Pairs(37, 111, 64, trained=True), "cpu", torch.float32))
    torch.set_num_threads(before)
    for name in results[0].values:
        torch.testing.assert_close(results[0].values[name], results[1].values[name], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(64, 60, generator=g)
    long = ids(60, 60, 9)
    views = {
        "transposed": (base[:21, :40].t(), base[21:42].t(), {}),
        "strided columns": (base[:20, ::2], base[20:50, ::2], {}),
        "expanded": (base[:1].expand(5, 60), base[:9], {"weight": torch.ones(1).expand(5)}),
        "strided ids": (base[:30], base[:20], {"query_ids": long["query_ids"][::2], "key_ids": long["key_ids"][::3]}),
        "strided positives": (base[:30], base[30:], {"positives": (torch.arange(60) % 34)[::2]}),
    }
    for name, (z1, z2, options) in views.items():
        results = []
        for f in (lambda t: t, lambda t: t.contiguous()):
            a, b = (f(z.detach()).requires_grad_() for z in (z1, z2))
            loss = fused_sigmoid(a, b, backend=backend, **{k: f(v) for k, v in options.items()})
            loss.backward()
            results.append((loss.detach(), a.grad, b.grad))
        for x, y in zip(*results):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_infinity_give_nan(backend, bad, side):
    for options in ({}, ids(40, 40, 5)):
        z = [torch.randn(40, 16), torch.randn(40, 16)]
        z[side][3, 5] = bad
        z[0].requires_grad_()
        loss = fused_sigmoid(*z, backend=backend, **options)
        loss.backward()
        assert loss.isnan()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_zero_vectors_get_zero_gradient(backend):
    z1, z2 = torch.randn(6, 8), torch.randn(9, 8)
    z1[2], z2[4], z2[8] = 0, 0, 1e-13
    z1.requires_grad_(), z2.requires_grad_()
    loss = fused_sigmoid(z1, z2, backend=backend)
    loss.backward()
    assert loss.isfinite() and z1.grad.isfinite().all() and z2.grad.isfinite().all()
    assert not z1.grad[2].any() and not z2.grad[4].any() and not z2.grad[8].any()
    assert z1.grad[1].any() and z2.grad[1].any()


def test_reference_gradcheck():
    z1, z2 = (z.requires_grad_() for z in Pairs(4, 6, 3).embeddings(torch.float64))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -1.0))
    some = {"query_ids": torch.tensor([0, 1, 2, 2]), "key_ids": torch.tensor([2, 1, 2, 5, 0, 1])}
    for options in ({}, some):
        f = lambda *a: fused_sigmoid(*a, backend="reference", **options)  # noqa: B023, E731
        assert torch.autograd.gradcheck(f, (z1, z2, scale, bias))
        assert torch.autograd.gradgradcheck(f, (z1, z2, scale, bias))


# --- the operator


def arguments(backend, trained=False, **options):
    z1, z2 = (z.float().requires_grad_() for z in Pairs(12, 20, 16).embeddings(torch.float32))
    numbers: dict[str, Any] = {"scale": 10.0, "bias": -10.0}
    if trained:
        numbers = {name: torch.tensor(x, requires_grad=True) for name, x in numbers.items()}
        numbers["weight"] = torch.rand(12).requires_grad_()
    p = Sigmoid(z1, z2, **numbers, **options)
    return *fused.arguments.flat(p, backend=backend, validate=False), [False] * 5


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(backend, trained, reduction):
    torch.library.opcheck(fused.op, arguments(backend, trained, reduction=reduction))
    torch.library.opcheck(fused.op, arguments(backend, trained, reduction=reduction, **ids(12, 20, 4)))


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph(backend, dynamic):
    torch._dynamo.reset()
    module = SigmoidLoss(torch.nn.Parameter(torch.tensor(8.0)), torch.nn.Parameter(torch.tensor(-9.0)), backend=backend)

    def step(z1, z2):
        return module(z1 * 2, z2 * 3) * 4 + fused_sigmoid(z1, z2, 5.0, -1.0, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B, N in ((12, 20), (9, 31), (5, 8)):
        results = []
        for function in (step, compiled):
            z1, z2 = (z.float().requires_grad_() for z in Pairs(B, N, 16).embeddings(torch.float32))
            module.zero_grad()
            loss = function(z1, z2)
            loss.backward()
            results.append((loss.detach(), z1.grad, z2.grad, module.scale.grad, module.bias.grad))
        for eager, traced in zip(*results):
            torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_the_embeddings_only(backend):
    z1, z2 = (z.float().requires_grad_() for z in Pairs(12, 20, 16).embeddings(torch.float32))
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -10.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_sigmoid(z1, z2, scale, bias, backend=backend)
    loss.backward()
    assert loss.dtype == z1.grad.dtype == scale.grad.dtype == bias.grad.dtype == torch.float32
    torch.testing.assert_close(loss, fused_sigmoid(z1.bfloat16(), z2.bfloat16(), backend=backend))


def test_the_module_holds_configuration_and_trained_numbers():
    z1, z2 = (z.float() for z in Pairs(8, 16).embeddings(torch.float32))
    module = SigmoidLoss(12.0, -8.0, reduction="sum")
    long = ids(8, 16, 3)
    torch.testing.assert_close(module(z1, z2, **long), fused_sigmoid(z1, z2, 12.0, -8.0, reduction="sum", **long))
    assert "scale=12.0, bias=-8.0, reduction='sum'" in repr(module)
    assert not list(module.parameters()) and not module.state_dict()
    trained = SigmoidLoss(*(torch.nn.Parameter(torch.tensor(x)) for x in (10.0, -10.0)))
    assert set(trained.state_dict()) == {"scale", "bias"}
    copy.deepcopy(trained)
    with pytest.raises(TypeError, match="'weight' belongs to a batch"):
        SigmoidLoss(weight=torch.ones(3))
    with pytest.raises(ValueError, match="scale must be a finite number > 0, got -1"):
        SigmoidLoss(-1.0)


def test_training_with_it_works():
    torch.manual_seed(0)
    encoder = torch.nn.Linear(20, 16)
    module = SigmoidLoss(*(torch.nn.Parameter(torch.tensor(x)) for x in (10.0, -10.0)))
    optimizer = torch.optim.Adam([*encoder.parameters(), *module.parameters()], lr=1e-2)
    x = torch.randn(64, 20)
    losses = []
    for _ in range(60):
        loss = module(encoder(x + 0.5 * torch.randn_like(x)), encoder(x + 0.5 * torch.randn_like(x)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# --- what is refused

z = torch.randn(4, 6)
long = torch.arange(4)
BAD = [
    # what is changed, the error, what its message must say
    ({"z1": torch.randn(4)}, ValueError, r"z1 must have 2 dimensions .* got shape \(4,\)"),
    ({"z1": [[1.0]]}, TypeError, r"z1 must be a torch.Tensor"),
    ({"z2": torch.randn(4, 7)}, ValueError, r"z2 must have z1's 6 features, got shape \(4, 7\)"),
    ({"z2": torch.randn(3, 6)}, ValueError, r"at least z1's 4 rows .* got 3; or pass positives, or query_ids"),
    ({"z2": z.double()}, TypeError, r"z2 must have z1's dtype torch.float32, got torch.float64"),
    ({"z2": torch.randn(4, 6, device="meta")}, ValueError, r"z2 must be on z1's device cpu, got meta"),
    ({"scale": 0}, ValueError, r"scale must be a finite number > 0, got 0"),
    ({"scale": math.nan}, ValueError, r"scale .* nan"),
    ({"scale": "10"}, TypeError, r"scale must be a number or a 0-d float tensor, got '10'"),
    ({"scale": torch.tensor([10.0])}, ValueError, r"scale .* shape \(1,\)"),
    ({"scale": torch.tensor(-1.0)}, ValueError, r"scale must be a finite number > 0, got a tensor holding -1.0"),
    ({"bias": math.inf}, ValueError, r"bias must be a finite number, got inf"),
    ({"bias": None}, TypeError, r"bias must be a number"),
    ({"bias": torch.tensor(math.nan)}, ValueError, r"bias must be a finite number, got a tensor holding nan"),
    ({"scale": 1e6}, ValueError, r"scale \+ \|bias\| may be 1e\+06 at most for torch.float32 .* it is 1.00001e\+06"),
    ({"bias": torch.tensor(-2e6)}, ValueError, r"scale \+ \|bias\| may be 1e\+06 at most .* it is 2.00001e\+06"),
    ({"z1": z.double(), "z2": z.double(), "scale": 2e12}, ValueError, r"1e\+12 at most for torch.float64"),
    ({"positives": long + 1}, ValueError, r"positives must lie in \[0, 3\] .* got 4"),
    ({"positives": torch.arange(3)}, ValueError, r"positives must have shape \(4,\), got \(3,\)"),
    ({"positives": torch.ones(4)}, TypeError, r"positives must be an integer tensor, got torch.float32"),
    ({"query_ids": long}, ValueError, r"key_ids must be given together with query_ids, got None"),
    ({"key_ids": long}, ValueError, r"query_ids must be given together with key_ids, got None"),
    ({"query_ids": long, "key_ids": torch.arange(5)}, ValueError, r"key_ids must have shape \(4,\), got \(5,\)"),
    ({"query_ids": long, "key_ids": long, "positives": long}, ValueError, r"positives and query_ids exclude each other"),
    ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(4,\), got \(3,\)"),
    ({"normalize": None}, TypeError, r"normalize must be True or False"),
    ({"reduction": "average"}, ValueError, r"reduction must be one of 'mean', 'sum', 'none', got 'average'"),
    ({"backend": "gpu"}, ValueError, r"backend must be one of 'auto'"),
    ({"validate": 1}, TypeError, r"validate must be True or False"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("change, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input(backend, change, error, message):
    with pytest.raises(error, match=message):
        fused_sigmoid(**{"z1": z, "z2": z, "backend": backend, **change})


def test_unread_numbers_that_are_bad_give_nan():
    """As on a GPU, where nobody waits for them."""
    p = Sigmoid(z, z, torch.tensor(-1.0), torch.tensor(1.0))
    assert p.numbers()[0].isnan() and p.numbers()[1] == 1


def test_cuda_has_no_kernels_of_it(monkeypatch):
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run here: it has no kernels .*triton have"):
        fused_sigmoid(z, z, backend="cuda")
    monkeypatch.setattr(backends, "unusable", lambda name: None)
    assert backends._auto.__wrapped__("cuda", "sigmoid") == "triton"
