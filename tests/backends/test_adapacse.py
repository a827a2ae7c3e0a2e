"""AdapACSE: every CPU backend against the float64 reference, and the reference against its formula."""

from __future__ import annotations

import copy
import math
from typing import Any

import instruction_sets
import pytest
import torch
import torch.nn.functional as F
from angular_pairs import ALL, Angles, check, ids, run
from torch import Tensor

from pycse import backends, fused_adapacse, fused_infonce
from pycse.losses import AdapACSELoss
from pycse.ops.adapacse import adapacse as fused
from pycse.panels import contrastive as panel
from pycse.problem import Angular

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


@instruction_sets.each
def test_every_instruction_set(isa, tmp_path):
    code = """
import torch
from angular_pairs import ALL, check
for case in ALL:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check(case, "cpu", dtype)
"""
    instruction_sets.run_with(isa, tmp_path, code)


def by_angles(z1: Tensor, z2: Tensor, temperature: float, m: float, alpha: Tensor) -> Tensor:
    """The formula with its angles: arc cosines, one row after another."""
    rows = []
    for i, z in enumerate(z1):
        theta = torch.stack([torch.arccos(F.cosine_similarity(z, key, dim=0)) for key in z2])
        turned = torch.where(theta > m, theta - m * (1 - alpha[i]), theta)
        logits = torch.cos(torch.where(torch.arange(len(z2)) == i, theta, turned)) / temperature
        rows.append(-F.log_softmax(logits, 0)[i])
    return torch.stack(rows).mean()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("m", [0.05, 0.8, 1.4, math.pi / 2])
@pytest.mark.parametrize("temperature", [0.05, 0.7])
def test_the_formula_by_arc_cosines(backend, temperature, m):
    case = Angles(9, 14, 6)
    z1, z2 = case.embeddings(torch.float64)
    ((q, k),) = case.teacher()["guides"]
    alpha = F.normalize(q, dim=1) @ F.normalize(k, dim=1).t()
    a, b = (z.clone().requires_grad_() for z in (z1, z2))
    expected = by_angles(a, b, temperature, m, alpha)
    expected.backward()
    for teacher in ({"guides": [(q, k)]}, {"guide_logits": alpha}):
        z1, z2 = (z.detach().clone().requires_grad_() for z in (z1, z2))
        loss = fused_adapacse(z1, z2, temperature, m, backend=backend, **teacher)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
        torch.testing.assert_close(z1.grad, a.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(z2.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_closed_form(backend):
    """Orthogonal rows, of which the teacher says alpha: a negative is turned from pi / 2 by m (1 - alpha)."""
    eye = 3 * torch.eye(20, 24, dtype=torch.float64)
    for alpha in (-3.0, -0.5, 0.0, 0.7, 1.0, 4.0):
        logits = torch.full((20, 20), alpha, dtype=torch.float64)
        loss = fused_adapacse(eye, eye, 0.5, 0.6, guide_logits=logits, backend=backend)
        turned = math.sin(0.6 * (1 - min(1, max(-1, alpha)))) / 0.5
        assert loss.item() == pytest.approx(math.log1p(19 * math.exp(turned - 2)), rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("how", ["no margin", "a teacher who finds all alike"])
def test_without_a_margin_it_is_infonce(backend, dtype, how):
    """Also of keys that are the row, or opposite to it, and beside them."""
    m, alike = (0.0, torch.randn(20, 65)) if how == "no margin" else (1.2, torch.full((20, 65), 1.5))
    options = ids(20, 65, 9)
    results = []
    for infonce in (False, True):
        z1, z2 = (z.requires_grad_() for z in Angles(20, 65, kind="mirrored").embeddings(dtype))
        tau = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
        if infonce:
            loss = fused_infonce(z1, z2, tau, backend=backend, **options)
        else:
            loss = fused_adapacse(z1, z2, tau, m, guide_logits=alike, backend=backend, **options)
        loss.backward()
        results.append((loss.detach(), z1.grad, z2.grad, tau.grad))
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * y.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_slope_of_opposite_rows_has_its_bound(backend, dtype):
    """All keys but the positive are opposite to their row, or nearly: |dL/ds| is (1 + 1024 sin(phi)) / temperature at
    most, and |ds/dz1| is below 1 for unit rows."""
    m, temperature = 0.9, 0.5
    for apart in (0.0, 1e-7, 1e-5, 1e-3, 0.02):
        g = torch.Generator().manual_seed(0)
        z1 = F.normalize(torch.randn(6, 16, generator=g, dtype=torch.float64), dim=1)
        z2 = torch.cat([z1, -(z1 + apart * torch.randn(6, 16, generator=g, dtype=torch.float64))])
        keep = {"query_ids": torch.zeros(6).long(), "key_ids": torch.cat([torch.zeros(6), torch.ones(6)]).long()}
        alpha = torch.linspace(-1, 1, 72, dtype=torch.float64).reshape(6, 12)
        z1, z2 = (z.to(dtype).requires_grad_() for z in (z1, z2))
        loss = fused_adapacse(z1, z2, temperature, m, guide_logits=alpha, reduction="sum", backend=backend, **keep)
        loss.backward()
        assert loss.isfinite() and z1.grad.isfinite().all() and z2.grad.isfinite().all()
        assert z1.grad.norm(dim=1).max() < (1 + 1024) / temperature
        assert z2.grad.norm(dim=1).max() < 6 * (1 + 1024) / temperature


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_exactly_opposite_and_exactly_alike(backend):
    """Similarities that are 1 and -1 without a rounding: theta = 0 has no margin, at pi the sine's slope is the floor's."""
    z1 = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    z2 = torch.tensor([[0.0, 1.0], [2.0, 0.0], [-3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    m, tau, alpha = 0.5, 0.8, torch.tensor([[0.0, -1.0, 0.2]], dtype=torch.float64)
    loss = fused_adapacse(z1, z2, tau, m, guide_logits=alpha, backend=backend)
    loss.backward()
    phi = m * 0.8
    e = [math.exp(x / tau) for x in (0.0, 1.0, -math.cos(phi))]
    assert loss.item() == pytest.approx(math.log(sum(e)), rel=1e-13)
    # Of keys on the row's own line no gradient is left by the projection; that of the positive is (p - 1) / tau.
    expected = torch.tensor([[0.0, (e[0] / sum(e) - 1) / tau]], dtype=torch.float64)
    torch.testing.assert_close(z1.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("side", [-1, 1])
def test_just_beside_the_margin(backend, side):
    """theta = m +- 1e-9: a negative is turned on one side alone."""
    m, tau, alpha = 0.4, 0.3, -0.5
    theta = m + side * 1e-9
    z1 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    z2 = torch.tensor([[0.0, 1.0], [math.cos(theta), math.sin(theta)]], dtype=torch.float64)
    loss = fused_adapacse(z1, z2, tau, m, guide_logits=torch.full((1, 2), alpha), backend=backend)
    turned = math.cos(theta - m * (1 - alpha)) if side > 0 else math.cos(theta)
    assert loss.item() == pytest.approx(math.log1p(math.exp(turned / tau)), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_rows_keep_their_digits(backend, dtype):
    """Losses of 1e-9 and below: p - 1 would be 0."""
    case = Angles(20, 40, m=0.05, temperature=0.03, kind="confident")
    z1, z2 = case.embeddings(dtype)
    results = []
    for name, convert in ((backend, lambda t: t), ("reference", lambda t: t.double())):
        a, b = (convert(z.clone()).requires_grad_() for z in (z1, z2))
        loss = fused_adapacse(a, b, 0.03, 0.05, backend=name, **case.teacher())
        loss.backward()
        results.append((loss.detach().double(), a.grad.double(), b.grad.double()))
    assert 0 < results[1][0] < 1e-5
    for x, y in zip(*results):
        assert (x - y).norm() <= (0.1 if dtype == torch.bfloat16 else 1e-4) * y.norm()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_what_a_teacher_says_of_other_keys_is_not_read(backend):
    """Of the positive and of keys with the row's id: NaN there says nothing. Of a negative it is NaN."""
    case, rows = Angles(12, 30, m=0.9), torch.arange(12)
    results = []
    for value in (0.3, math.nan):
        z1, z2 = (z.float().requires_grad_() for z in case.embeddings(torch.float32))
        logits = torch.rand(12, 30, generator=torch.Generator().manual_seed(1))
        logits[rows, rows] = logits[3, 20] = value
        same = {"query_ids": rows, "key_ids": torch.arange(30)}
        same["key_ids"][20] = 3
        loss = fused_adapacse(z1, z2, 0.1, 0.9, guide_logits=logits, backend=backend, **same)
        loss.backward()
        results.append((loss.detach(), z1.grad, z2.grad))
    for x, y in zip(*results):
        assert torch.equal(x, y)
    logits[5, 21] = math.nan
    loss = fused_adapacse(z1, z2, 0.1, 0.9, guide_logits=logits, reduction="none", backend=backend)
    assert loss.isnan()[[3, 5]].all()


NEEDS = [("z1",), ("z2",), ("temperature",), ("weight",), ("z1", "temperature"), ("z2", "weight")]
LEAVES = ("z1", "z2", "temperature", "weight")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", NEEDS, ids="+".join)
def test_only_the_gradients_asked_for(backend, reduction, needs):
    def gradients(which, name):
        g = torch.Generator().manual_seed(3)
        leaves = {
            "z1": torch.randn(18, 24, generator=g),
            "z2": torch.randn(30, 24, generator=g),
            "temperature": torch.tensor(0.2),
            "weight": torch.rand(18, generator=g),
        }
        options = {"guide_logits": torch.rand(18, 30, generator=g), "reduction": reduction, **ids(18, 30, 8)}
        for leaf in which:
            leaves[leaf].requires_grad_()
        fused_adapacse(backend=name, m=0.4, **leaves, **options).sum().backward()
        return {leaf: tensor.grad for leaf, tensor in leaves.items()}

    every = gradients(LEAVES, "reference")
    for leaf, grad in gradients(needs, backend).items():
        assert (grad is not None) == (leaf in needs)
        if grad is not None:
            torch.testing.assert_close(grad, every[leaf], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("threads", [2, 3])
def test_result_does_not_depend_on_the_number_of_threads(threads):
    before = torch.get_num_threads()
    results = []
    for n in (1, threads):
        torch.set_num_threads(n)
        results.append(run(Angles(37, 111, 64, trained=True), "cpu", torch.float32))
    torch.set_num_threads(before)
    for name in results[0].values:
        torch.testing.assert_close(results[0].values[name], results[1].values[name], rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_teachers_of_any_type(backend, given, dtype):
    """Logits of every type, and with strides, beside embeddings of every type."""
    z1, z2 = Angles(20, 47).embeddings(dtype)
    logits = torch.rand(20, 47, generator=torch.Generator().manual_seed(2)).to(given)
    expected = fused_adapacse(z1.double(), z2.double(), guide_logits=logits, backend="reference")
    wide = torch.zeros(40, 94, dtype=given)
    wide[::2, ::2] = logits
    for view in (logits, wide[::2, ::2], logits.t().contiguous().t()):
        loss = fused_adapacse(z1, z2, guide_logits=view, backend=backend)
        torch.testing.assert_close(loss.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    row = logits[:1].expand(20, 47)
    assert fused_adapacse(z1, z2, guide_logits=row, backend=backend).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend):
    g = torch.Generator().manual_seed(0)
    base, long = torch.randn(64, 60, generator=g), ids(60, 60, 9)
    views = {
        "transposed": (base[:21, :40].t(), base[21:42].t(), {}),
        "strided columns": (base[:20, ::2], base[20:50, ::2], {}),
        "expanded": (base[:1].expand(5, 60), base[:9], {"weight": torch.ones(1).expand(5)}),
        "strided ids": (base[:20], base[:30], {"query_ids": long["query_ids"][::3], "key_ids": long["key_ids"][::2]}),
        "strided positives": (base[:30], base[30:], {"positives": (torch.arange(60) % 34)[::2]}),
    }
    for name, (z1, z2, options) in views.items():
        guides = [(torch.randn(z1.shape[0], 7, generator=g), torch.randn(z2.shape[0], 7, generator=g))]
        results = []
        for f in (lambda t: t, lambda t: t.contiguous()):
            a, b = (f(z.detach()).requires_grad_() for z in (z1, z2))
            given = {k: f(v) for k, v in options.items()}
            loss = fused_adapacse(a, b, guides=guides, backend=backend, **given)
            loss.backward()
            results.append((loss.detach(), a.grad, b.grad))
        for x, y in zip(*results):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_infinity_give_nan(backend, bad, side):
    z = [torch.randn(40, 16), torch.randn(40, 16)]
    z[side][3, 5] = bad
    z[0].requires_grad_()
    loss = fused_adapacse(*z, guide_logits=torch.rand(40, 40), backend=backend)
    loss.backward()
    assert loss.isnan()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("m", [0.3, math.pi / 2])
def test_zero_vectors_get_zero_gradient(backend, m):
    z1, z2 = torch.randn(6, 8), torch.randn(9, 8)
    z1[2], z2[4], z2[8] = 0, 0, 1e-13
    z1.requires_grad_(), z2.requires_grad_()
    loss = fused_adapacse(z1, z2, 0.3, m, guide_logits=torch.rand(6, 9), backend=backend)
    loss.backward()
    assert loss.isfinite() and z1.grad.isfinite().all() and z2.grad.isfinite().all()
    assert not z1.grad[2].any() and not z2.grad[4].any() and not z2.grad[8].any()
    assert z1.grad[1].any() and z2.grad[1].any()


def test_reference_gradcheck():
    z1, z2 = (z.requires_grad_() for z in Angles(4, 6, 3).embeddings(torch.float64))
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    alpha = torch.linspace(-1.2, 1.2, 24, dtype=torch.float64).reshape(4, 6)
    for options in ({}, {"query_ids": torch.tensor([0, 1, 2, 2]), "key_ids": torch.tensor([2, 1, 2, 5, 0, 1])}):
        f = lambda *a: fused_adapacse(*a, 0.7, guide_logits=alpha, backend="reference", **options)  # noqa: B023, E731
        assert torch.autograd.gradcheck(f, (z1, z2, tau))
        assert torch.autograd.gradgradcheck(f, (z1, z2, tau))


# --- the operator


def arguments(backend, trained=False, guides=False, **options):
    z1, z2 = (z.float().requires_grad_() for z in Angles(12, 20, 16).embeddings(torch.float32))
    given: dict[str, Any] = {"temperature": 0.1}
    if trained:
        given = {"temperature": torch.tensor(0.1, requires_grad=True), "weight": torch.rand(12).requires_grad_()}
    if guides:
        given |= {"guide_queries": torch.randn(12, 5), "guide_keys": torch.randn(20, 5)}
    else:
        given["guide_logits"] = torch.rand(12, 20)
    p = Angular(z1, z2, **given, m=0.4, **options)
    return *fused.arguments.flat(p, backend=backend, validate=False), [False] * 4


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(backend, trained, reduction):
    torch.library.opcheck(fused.op, arguments(backend, trained, reduction=reduction))
    torch.library.opcheck(fused.op, arguments(backend, trained, True, reduction=reduction, **ids(12, 20, 4)))


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph(backend, dynamic):
    torch._dynamo.reset()
    module = AdapACSELoss(torch.nn.Parameter(torch.tensor(0.2)), 0.4, backend=backend)

    def step(z1, z2, e1, e2):
        alone = fused_adapacse(z1, z2, 0.1, 0.3, guide_logits=e1 @ e2.t(), backend=backend)
        return module(z1 * 2, z2 * 3, guides=[(e1, e2)]) * 4 + alone

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B, N in ((12, 20), (9, 31), (5, 8)):
        results = []
        guides = torch.randn(B, 6) / 6, torch.randn(N, 6) / 6
        for function in (step, compiled):
            z1, z2 = (z.float().requires_grad_() for z in Angles(B, N, 16).embeddings(torch.float32))
            module.zero_grad()
            loss = function(z1, z2, *guides)
            loss.backward()
            results.append((loss.detach(), z1.grad, z2.grad, module.temperature.grad))
        for eager, traced in zip(*results):
            torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_the_embeddings_only(backend):
    z1, z2 = (z.float().requires_grad_() for z in Angles(12, 20, 16).embeddings(torch.float32))
    tau, logits = torch.tensor(0.1, requires_grad=True), torch.rand(12, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_adapacse(z1, z2, tau, guide_logits=logits, backend=backend)
    loss.backward()
    assert loss.dtype == z1.grad.dtype == tau.grad.dtype == torch.float32
    half = fused_adapacse(z1.bfloat16(), z2.bfloat16(), 0.1, guide_logits=logits, backend=backend)
    torch.testing.assert_close(loss, half, rtol=1e-3, atol=1e-5)


def test_the_module_holds_configuration_and_a_trained_temperature():
    z1, z2 = (z.float() for z in Angles(8, 16).embeddings(torch.float32))
    guides, long = [(torch.randn(8, 5), torch.randn(16, 5))], ids(8, 16, 3)
    module = AdapACSELoss(0.2, 0.5, reduction="sum")
    expected = fused_adapacse(z1, z2, 0.2, 0.5, reduction="sum", guides=guides, **long)
    torch.testing.assert_close(module(z1, z2, guides=guides, **long), expected)
    assert "temperature=0.2, m=0.5, reduction='sum'" in repr(module)
    assert not list(module.parameters()) and not module.state_dict()
    trained = AdapACSELoss(torch.nn.Parameter(torch.tensor(0.1)))
    assert set(trained.state_dict()) == {"temperature"}
    copy.deepcopy(trained)
    with pytest.raises(TypeError, match="'guides' belongs to a batch"):
        AdapACSELoss(guides=guides)
    with pytest.raises(TypeError, match="'normalize' is none of"):
        AdapACSELoss(normalize=False)
    with pytest.raises(ValueError, match="m must lie between 0 and pi/2"):
        AdapACSELoss(m=2.0)


def test_training_with_it_works():
    torch.manual_seed(0)
    encoder = torch.nn.Linear(20, 16)
    module = AdapACSELoss(torch.nn.Parameter(torch.tensor(0.3)), 0.2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *module.parameters()], lr=1e-2)
    x = torch.randn(64, 20)
    losses = []
    for _ in range(60):
        a, b = (x + 0.5 * torch.randn_like(x) for _ in range(2))
        loss = module(encoder(a), encoder(b), guides=[(x, x)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# --- what is refused

z = torch.randn(4, 6)
long = torch.arange(4)
logits = torch.rand(4, 4)
BAD = [
    # what is changed, the error, what its message must say
    ({"z1": torch.randn(4)}, ValueError, r"z1 must have 2 dimensions .* got shape \(4,\)"),
    ({"z1": [[1.0]]}, TypeError, r"z1 must be a torch.Tensor"),
    ({"z2": torch.randn(4, 7)}, ValueError, r"z2 must have z1's 6 features, got shape \(4, 7\)"),
    ({"z2": torch.randn(3, 6)}, ValueError, r"at least z1's 4 rows .* got 3; or pass positives"),
    ({"z2": z.double()}, TypeError, r"z2 must have z1's dtype torch.float32, got torch.float64"),
    ({"z2": torch.randn(4, 6, device="meta")}, ValueError, r"z2 must be on z1's device cpu, got meta"),
    ({"temperature": 0}, ValueError, r"temperature must be a finite number > 0, got 0"),
    ({"temperature": "x"}, TypeError, r"temperature must be a number or a 0-d float tensor, got 'x'"),
    ({"temperature": torch.tensor(-1.0)}, ValueError, r"temperature must be .* got a tensor holding -1.0"),
    ({"temperature": 1e-7}, ValueError, r"temperature must be at least 1e-06 for torch.float32 .* got 1e-07"),
    ({"temperature": torch.tensor(1e-7)}, ValueError, r"temperature must be at least 1e-06"),
    ({"m": -0.1}, ValueError, r"m must lie between 0 and pi/2 \(an angle in radians\), got -0.1"),
    ({"m": 1.6}, ValueError, r"m must lie between 0 and pi/2 .* got 1.6"),
    ({"m": math.nan}, ValueError, r"m must be a finite number, got nan"),
    ({"m": None}, TypeError, r"m must be a number, got None"),
    ({"m": torch.tensor(0.3)}, TypeError, r"m must be a number, got a torch.float32 tensor"),
    ({"guide_logits": None}, ValueError, r"guides or guide_logits must be given .* got None for both"),
    ({"guide_logits": torch.rand(4, 5)}, ValueError, r"guide_logits must have shape \(4, 4\), got \(4, 5\)"),
    ({"guide_logits": logits.clone().requires_grad_()}, ValueError, r"guide_logits requires grad"),
    ({"guide_logits": long}, TypeError, r"guide_logits must be a float tensor"),
    ({"guides": [(z, z)]}, ValueError, r"guides and guide_logits exclude each other"),
    ({"guide_weights": [1]}, ValueError, r"guide_weights and guide_logits exclude each other"),
    ({"guide_logits": None, "guide_weights": [1]}, ValueError, r"guide_weights must be given together with guides"),
    ({"guide_logits": None, "guides": z}, TypeError, r"guides must be a list of pairs of embeddings"),
    ({"guide_logits": None, "guides": []}, ValueError, r"guides must hold at least one guide's embeddings"),
    ({"guide_logits": None, "guides": [(z, z[:3])]}, ValueError, r"guides\[0\]\[1\] must have z2's 4 rows"),
    ({"positives": long + 1}, ValueError, r"positives must lie in \[0, 3\] .* got 4"),
    ({"positives": torch.arange(3)}, ValueError, r"positives must have shape \(4,\), got \(3,\)"),
    ({"query_ids": long}, ValueError, r"key_ids must be given together with query_ids, got None"),
    ({"key_ids": long}, ValueError, r"query_ids must be given together with key_ids, got None"),
    ({"query_ids": long, "key_ids": torch.arange(5)}, ValueError, r"key_ids must have shape \(4,\), got \(5,\)"),
    ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(4,\), got \(3,\)"),
    ({"reduction": "average"}, ValueError, r"reduction must be one of 'mean', 'sum', 'none', got 'average'"),
    ({"backend": "gpu"}, ValueError, r"backend must be one of 'auto'"),
    ({"validate": 1}, TypeError, r"validate must be True or False"),
    ({"normalize": True}, TypeError, r"unexpected keyword argument 'normalize'"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("change, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input(backend, change, error, message):
    with pytest.raises(error, match=message):
        fused_adapacse(**{"z1": z, "z2": z, "guide_logits": logits, "backend": backend, **change})


def test_unread_numbers_that_are_bad_give_nan():
    """As on a GPU, where nobody waits for them."""
    p = Angular(z, z, torch.tensor(-1.0), guide_logits=logits)
    assert p.sharpness().isnan() and p.shift is None


def test_cuda_has_no_kernels_of_it(monkeypatch):
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run here: it has no kernels .*triton have"):
        fused_adapacse(z, z, guide_logits=logits, backend="cuda")
    monkeypatch.setattr(backends, "unusable", lambda name: None)
    assert backends._auto.__wrapped__("cuda", "adapacse") == "triton"
