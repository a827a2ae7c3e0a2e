"""A loss at several lengths of the embeddings: every CPU route beside the float64 reference, the reference beside the
definition, and what is said about bad lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import pycse
from pycse import MatryoshkaOutput, fused_focal_infonce, fused_infonce
from pycse.backends.cpu import prefixes as cpu
from pycse.losses import InfoNCELoss
from pycse.ops.matryoshka import ARGUMENTS, matryoshka
from pycse.panels import prefixes as panel
from pycse.problem import Contrastive, Lengths

from cases import MATRYOSHKA
from oracle import Case, check, run

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MATRYOSHKA, ids=str)
def test_in_one_call(case, dtype):
    check(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", MATRYOSHKA, ids=str)
def test_in_panels_of_13_rows(case, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", {})
    monkeypatch.setattr(panel, "panel_rows", lambda p, K: min(13, p.mine.stop - p.mine.start))
    check(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", MATRYOSHKA, ids=str)
def test_length_by_length(case, dtype):
    check(case, "torch", dtype)


def embeddings(B: int = 12, N: int = 30, D: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return tuple(z.to(dtype).requires_grad_() for z in Case(B, N, D).embeddings())


@pytest.mark.parametrize("backend", ["reference", "cpu", "torch"])
def test_the_definition(backend):
    """sum_k w_k of cross entropy over cosines of the first d_k features."""
    dims, weights = [24, 3, 10], [0.5, 2.0, 1.0]
    z1, z2 = embeddings()
    labels = torch.arange(12)
    parts = torch.stack([cross_entropy(normalize(z1[:, :d]) @ normalize(z2[:, :d]).t() / 0.05, labels) for d in dims])
    expected = (parts * torch.tensor(weights, dtype=torch.float64)).sum()
    actual = fused_infonce(z1, z2, 0.05, dims=dims, dim_weights=weights, parts=True, backend=backend)
    assert isinstance(actual, MatryoshkaOutput) and not actual.parts.requires_grad
    torch.testing.assert_close(actual.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(actual.parts, parts.detach(), rtol=1e-12, atol=0)
    for x, y in zip(torch.autograd.grad(actual.loss, (z1, z2)), torch.autograd.grad(expected, (z1, z2))):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


GUIDES = [(torch.linspace(-1, 1, 12 * 5).sin().view(12, 5), torch.linspace(-2, 2, 30 * 5).cos().view(30, 5))]
IDS = torch.arange(12) % 4
TEACHER = torch.linspace(-3, 3, 12 * 7).sin().view(12, 7)
FAMILY = {
    "infonce": lambda z1, z2, t, **more: pycse.fused_infonce(z1, z2, t, **more),
    "focal": lambda z1, z2, t, **more: pycse.fused_focal_infonce(z1, z2, t, **more),
    "supcon": lambda z1, z2, t, **more: pycse.fused_supcon(z1, IDS, temperature=t, **more),
    "adapacse": lambda z1, z2, t, **more: pycse.fused_adapacse(z1, z2, t, guides=GUIDES, **more),
    "sigmoid": lambda z1, z2, t, **more: pycse.fused_sigmoid(z1, z2, 1 / t, **more),
    "distillcse": lambda z1, z2, t, **more: pycse.fused_distillcse(z1, z2, [TEACHER], t, seed=3, **more),
    "distill": lambda z1, z2, t, **more: pycse.fused_distill(z1, [TEACHER], seed=3, **more),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", FAMILY)
def test_every_loss_is_the_sum_of_its_lengths(name, reduction):
    loss, dims, weights = FAMILY[name], [7, 24, 16], [1.0, 0.25, 3.0]
    z1, z2 = embeddings()
    one = lambda d: loss(z1[:, :d], z2[:, :d], 0.1, reduction=reduction)  # noqa: E731
    separate = [x[0] if isinstance(x, tuple) else x for x in map(one, dims)]
    expected = sum(x * w for x, w in zip(separate, weights))
    together = loss(z1, z2, 0.1, dims=dims, dim_weights=weights, parts=True, reduction=reduction)
    torch.testing.assert_close(together[0], expected, rtol=1e-12, atol=1e-13)
    if name == "distillcse":
        parts = together.contrastive + together.distillation
        whole = loss(z1, z2, 0.1, dims=dims, dim_weights=weights, reduction=reduction)
        torch.testing.assert_close(whole.loss, whole.contrastive + whole.distillation, rtol=1e-12, atol=1e-13)
    else:
        parts = together.parts
    torch.testing.assert_close(parts, torch.stack([x.detach() for x in separate]), rtol=1e-12, atol=1e-13)
    upstream = torch.ones_like(expected) * 0.7
    for x, y in zip(
        torch.autograd.grad(together[0], (z1, z2), upstream, allow_unused=True),
        torch.autograd.grad(expected, (z1, z2), upstream, allow_unused=True),
    ):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_temperature_for_each_length(backend, symmetric):
    z1, z2 = embeddings(N=12)
    dims, each = [24, 5, 11], torch.tensor([0.05, 0.2, 0.1], dtype=torch.float64, requires_grad=True)
    actual = fused_focal_infonce(z1, z2, each, dims=dims, symmetric=symmetric, backend=backend)
    one = lambda d, t: fused_focal_infonce(z1[:, :d], z2[:, :d], t, symmetric=symmetric, backend="reference")  # noqa: E731
    expected = sum(one(d, t) for d, t in zip(dims, each))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    for x, y in zip(torch.autograd.grad(actual, (z1, z2, each)), torch.autograd.grad(expected, (z1, z2, each))):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    numbers = fused_focal_infonce(z1, z2, each.tolist(), dims=dims, symmetric=symmetric, backend=backend)
    torch.testing.assert_close(numbers, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("small", [True, False])
def test_the_order_of_lengths_changes_nothing_but_the_parts(small, monkeypatch):
    if not small:
        monkeypatch.setattr(cpu, "SMALL", {})
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        z1, z2 = embeddings(dtype=torch.float32)
        dims, weights = [4, 9, 20], [1.0, 2.0, 0.5]
        loss, parts = fused_infonce(
            z1, z2, dims=[dims[k] for k in order], dim_weights=[weights[k] for k in order], parts=True
        )
        loss.backward()
        results.append((parts[torch.tensor(order).argsort()], z1.grad, z2.grad))
    for x, y in zip(*results):
        assert torch.equal(x, y)
    assert not results[0][1][:, 20:].any() and not results[0][2][:, 20:].any()  # features beyond the longest


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads, small, monkeypatch):
    if not small:
        monkeypatch.setattr(cpu, "SMALL", {})
    case, before = Case(37, 111, 64, options={"dims": [5, 64, 32]}), torch.get_num_threads()
    results = []
    for n in (1, threads):
        torch.set_num_threads(n)
        results.append(run(case, "cpu", torch.float32))
    torch.set_num_threads(before)
    for name, x in results[0].values.items():
        torch.testing.assert_close(x, results[1].values[name], rtol=2e-6, atol=1e-7)
    again = run(case, "cpu", torch.float32)
    assert all(torch.equal(x, run(case, "cpu", torch.float32).values[name]) for name, x in again.values.items())


@pytest.mark.parametrize("needs", [("z1",), ("z2",), ("temperature",), ("weight",), ()])
@pytest.mark.parametrize("small", [True, False])
def test_only_some_gradients(needs, small, monkeypatch):
    if not small:
        monkeypatch.setattr(cpu, "SMALL", {})
    given = dict(zip(("z1", "z2"), embeddings(dtype=torch.float32)))
    given |= {"temperature": torch.tensor(0.1), "weight": torch.rand(12)}
    of = lambda names: {k: x.detach().clone().requires_grad_(k in names) for k, x in given.items()}  # noqa: E731
    everything, some = of(given), of(needs)
    fused_infonce(**everything, dims=[3, 24]).backward()
    loss = fused_infonce(**some, dims=[3, 24])
    if not needs:
        assert not loss.requires_grad
        return
    loss.backward()
    for name, x in some.items():
        assert (x.grad is not None) == (name in needs)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, everything[name].grad, rtol=1e-5, atol=1e-7)


def test_the_products_are_those_of_one_loss(monkeypatch):
    """Counted: 6 B N D multiply-adds for all lengths, and no copy of the features."""
    monkeypatch.setattr(cpu, "SMALL", {})
    done = []
    for name in ("product", "add_product"):
        original = getattr(cpu.Kernels, name)

        def counted(self, x, y, z, original=original, name=name):
            a, b = (x, y) if name == "product" else (y, z)
            done.append(a.shape[0] * a.shape[1] * b.shape[1])
            return original(self, x, y, z)

        monkeypatch.setattr(cpu.Kernels, name, counted)
    z1, z2 = embeddings(40, 90, 32, torch.float32)
    fused_infonce(z1, z2, dims=[32, 16, 8, 4]).backward()
    assert sum(done) == 3 * 40 * 90 * 32


@pytest.mark.clean_memory
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(backend, reduction):
    z1, z2 = embeddings(dtype=torch.float32)
    temperature = torch.tensor([0.1, 0.2], requires_grad=True)
    p = Contrastive(z1, z2, temperature, 0.0, torch.rand(12).requires_grad_(), reduction=reduction)
    args = ARGUMENTS.flat(p, Lengths([24, 8], [1.0, 2.0], True), backend=backend, validate=False)
    torch.library.opcheck(matryoshka.op, (*args, [False] * 5))


def test_compiled():
    torch._dynamo.reset()

    def step(z1, z2):
        return fused_infonce(z1 * 2, z2, 0.05, dims=[24, 6], dim_weights=[1.0, 0.5]) * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        z1, z2 = embeddings(dtype=torch.float32)
        function(z1, z2).backward()
        results.append((z1.grad, z2.grad))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y)


def test_some_lengths_in_each_step():
    z1, z2 = embeddings()
    loss = InfoNCELoss(dims=[24, 12, 6, 3], dim_weights=[1, 2, 3, 4], n_dims_per_step=2)
    twin = InfoNCELoss(dims=[24, 12, 6, 3], dim_weights=[1, 2, 3, 4], n_dims_per_step=2)
    values = [loss(z1, z2).item() for _ in range(8)]
    assert len(set(values)) > 1 and values == [twin(z1, z2).item() for _ in range(8)]
    pairs = [(24, 1), (12, 2), (6, 3), (3, 4)]
    of = {d: w * fused_infonce(z1[:, :d], z2[:, :d]).item() for d, w in pairs}
    sums = [of[a] + of[b] for a in of for b in of if a > b]
    for value in values:
        assert min(abs(value - x) for x in sums) < 1e-9
    loss.eval()
    assert loss(z1, z2).item() == pytest.approx(sum(of.values()))
    assert "n_dims_per_step=2" in repr(loss)


BAD = [
    (TypeError, "dims must be a list of lengths, got 3", {"dims": 3}),
    (TypeError, "dims must be a list of lengths, got a torch.int64 tensor", {"dims": torch.tensor([3])}),
    (ValueError, "dims must hold at least one length", {"dims": []}),
    (TypeError, "dims must be an integer, got 3.0", {"dims": [3.0]}),
    (ValueError, r"dims must be >= 1, got 0", {"dims": [0]}),
    (ValueError, r"dims must lie in \[1, 24\] \(the embeddings' features\), got 25", {"dims": [25]}),
    (ValueError, r"dims must hold each length once, got \[4, 4\]", {"dims": [4, 4]}),
    (ValueError, "dim_weights must be 2 numbers, one a length", {"dims": [4, 8], "dim_weights": [1]}),
    (ValueError, r"dim_weights\[1\] must be >= 0, got -1", {"dims": [4, 8], "dim_weights": [1, -1]}),
    (ValueError, "dim_weights must have a finite sum > 0", {"dims": [4, 8], "dim_weights": [0, 0]}),
    (ValueError, "dim_weights must be given together with dims", {"dim_weights": [1]}),
    (ValueError, "parts must be given together with dims", {"parts": True}),
    (TypeError, "parts must be True or False", {"dims": [4], "parts": 1}),
]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("error, message, given", BAD, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_bad_lengths(error, message, given, name):
    with pytest.raises(error, match=message):
        FAMILY[name](*embeddings(), 0.1, **given)


@pytest.mark.parametrize(
    "temperature, message",
    [
        ([0.1], "temperature must be one number, or one for each of the 2 lengths"),
        (torch.ones(3), "temperature must be a number, a 0-d float tensor, or one for each of the 2 lengths"),
        ([0.1, 0], r"temperature\[1\] must be a finite number > 0, got 0"),
        (torch.tensor([0.1, -1.0]), "temperature must be a finite number > 0, got a tensor holding -1.0"),
        (torch.tensor([0.1, torch.nan]), "temperature must be a finite number > 0, got a tensor holding nan"),
        ([0.1, 1e-9], "temperature must be larger"),
    ],
    ids=str,
)
def test_bad_temperatures(temperature, message):
    with pytest.raises(ValueError, match=message):
        fused_infonce(*embeddings(dtype=torch.float32), temperature, dims=[4, 8])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_dims_per_step": 1}, "n_dims_per_step must be given together with dims"),
        ({"dims": [4, 8], "n_dims_per_step": 3}, r"n_dims_per_step must lie in \[1, 2\]"),
        ({"dims": [4, 8], "n_dims_per_step": 1, "parts": True}, "n_dims_per_step and parts exclude each other"),
        ({"dims": [4, 8], "n_dims_per_step": 1, "temperature": [0.1, 0.2]}, "n_dims_per_step and a temperature"),
        ({"dims": [4, 4]}, "dims must hold each length once"),
        ({"parts": True}, "parts must be given together with dims"),
    ],
    ids=str,
)
def test_bad_options_of_a_module(options, message):
    with pytest.raises(ValueError, match=message):
        InfoNCELoss(**options)
