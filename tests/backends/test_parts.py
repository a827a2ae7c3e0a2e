"""Rows whose negatives come in parts: directions beside sentence-transformers' own code, listed negatives beside loops,
log-sums, panels of few rows, and what else the table of cases (tests/helpers/cases.py) does not show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pycse import fused_focal_infonce, fused_infonce, logsumexp_similarities
from pycse.losses import InfoNCELoss
from pycse.ops.contrastive import contrastive as fused
from pycse.panels import parts, sides
from pycse.problem import Contrastive

from cases import EVERY, PARTS, lists
from oracle import Case, check

BACKENDS = ["reference", "torch", "cpu"]
DOCS = Path(__file__).parents[2] / "docs" / "losses.md"


def embeddings(B: int, N: int, D: int = 16, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(z.to(dtype).requires_grad_() for z in Case(B, N, D).embeddings())


class Given(torch.nn.Module):
    """A model whose embeddings are there already."""

    def forward(self, features):
        return {"sentence_embedding": features["embeddings"]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [12, 36])
@pytest.mark.parametrize(
    "hardness", [{}, {"hardness": 5.0, "hardness_mode": "hard_negatives"}, {"hardness": 9.0}], ids=str
)
@pytest.mark.parametrize(
    "directions, partition",
    [(["qd", "qq"], "joint"), (["qd", "dd"], "joint"), (EVERY, "joint"), (["qd", "dq"], "per_direction")],
)
def test_directions_are_those_of_sentence_transformers(directions, partition, hardness, N, backend):
    if hardness.get("hardness_mode") == "hard_negatives" and N == 12:
        pytest.skip("there are no hard negatives")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    names = {"qd": "query_to_doc", "qq": "query_to_query", "dq": "doc_to_query", "dd": "doc_to_doc"}
    z1, z2 = embeddings(12, N)
    theirs = losses.MultipleNegativesRankingLoss(
        Given(), scale=20.0, directions=tuple(names[d] for d in directions), partition_mode=partition,
        hardness_strength=hardness.get("hardness", 0.0),
        hardness_mode=hardness.get("hardness_mode", "all_negatives") if hardness else None,
    )  # fmt: skip
    expected = theirs.compute_loss_from_embeddings([z1, *z2.split(12)], None)
    actual = fused_infonce(z1, z2, 0.05, directions=directions, partition=partition, backend=backend, **hardness)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for x, y in zip(torch.autograd.grad(actual, (z1, z2)), torch.autograd.grad(expected, (z1, z2))):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_recipe_of_qwen3(backend):
    """arXiv 2506.05176, eq. 1: Z_i = sum over qd, qq, dd, without what is above the positive's similarity + 0.1."""
    z1, z2 = embeddings(9, 9)
    q, d = (torch.nn.functional.normalize(z, dim=1) for z in (z1, z2))
    s, total = q @ d.t(), torch.zeros(9, dtype=torch.float64)
    for sims in (s, q @ q.t(), d @ d.t()):
        keep = (sims <= s.diagonal()[:, None] + 0.1) & ~torch.eye(9, dtype=torch.bool)
        total = total + (sims / 0.05).exp().masked_fill(~keep, 0).sum(1)
    positive = (s.diagonal() / 0.05).exp()
    expected = -(positive / (positive + total)).log().mean()
    actual = fused_infonce(z1, z2, directions=("qd", "qq", "dd"), exclude_above=0.1, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positives", [None, torch.arange(8) * 2])
def test_a_listed_key_serves_the_rows_that_list_it_alone(positives, backend):
    z1, z2 = embeddings(8, 30)
    ptr, index = lists(8, 30, 16)
    q, d = (torch.nn.functional.normalize(z, dim=1) for z in (z1, z2))
    rows = []
    for i in range(8):
        own = index[ptr[i] : ptr[i + 1]].tolist()
        pos = i if positives is None else int(positives[i])
        keys = [pos, *(j for j in range(30) if j != pos and j not in index.tolist()), *own]
        weight = torch.tensor([0.0] * (len(keys) - len(own)) + [0.7] * len(own), dtype=torch.float64)
        rows.append((d[keys] @ q[i] / 0.05 + weight).logsumexp(0) - d[pos] @ q[i] / 0.05)
    expected = torch.stack(rows).mean()
    options = {"positives": positives, "negatives": (ptr, index), "hard_negative_weight": 0.7, "backend": backend}
    actual = fused_infonce(z1, z2, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for x, y in zip(torch.autograd.grad(actual, (z1, z2)), torch.autograd.grad(expected, (z1, z2))):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PARTS, ids=str)
def test_panels_of_7_rows_and_3_pairs(case, dtype, backend, monkeypatch):
    monkeypatch.setattr(parts, "panel_rows", lambda B, *_: min(B, 7))
    monkeypatch.setattr(sides, "PAIR_BYTES", 3 * 4 * case.D)
    check(case, backend, dtype)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_lists_of_all_rows_are_the_loss_with_hard_negatives(backend):
    """Every row lists the same keys: what a call without lists computes."""
    z1, z2 = embeddings(10, 25, dtype=torch.float32)
    everyone = (torch.arange(11) * 15, torch.arange(10, 25).repeat(10))
    results = []
    for options in ({}, {"negatives": everyone}):
        loss = fused_focal_infonce(z1, z2, backend=backend, **options)
        results.append((loss, *torch.autograd.grad(loss, (z1, z2))))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("case", [PARTS[0], PARTS[18]], ids=str)
def test_same_call_same_bits_whatever_the_threads(case, backend):
    from oracle import run

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(case, backend, torch.float32))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].values.items():
        assert torch.equal(value, results[1].values[name]) and torch.equal(value, results[2].values[name]), name


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    "options", [{"directions": EVERY}, {"negatives": lists(12, 24, 12)}], ids=["directions", "lists"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(options, reduction, backend):
    z1, z2 = embeddings(12, 24, dtype=torch.float32)
    tau = torch.tensor(0.07, requires_grad=True)
    given = {"directions": " ".join(EVERY)} if "directions" in options else dict(
        zip(("negatives_ptr", "negatives_index"), options["negatives"])
    )  # fmt: skip
    p = Contrastive(z1, z2, tau, reduction=reduction, **given)
    torch.library.opcheck(fused.op, (*fused.arguments.flat(p, backend=backend, validate=False), [False] * 5))


@pytest.mark.clean_memory
def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    module = InfoNCELoss(directions=EVERY)
    ptr, index = lists(8, 24, 8)

    def step(z1, z2):
        listed = fused_infonce(z1, z2, negatives=(ptr, index))
        return module(z1 * 2, z2) + listed + logsumexp_similarities(z1, z2, include_positive=False).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    z1, z2 = embeddings(8, 24, dtype=torch.float32)
    results = []
    for function in (step, compiled):
        loss = function(z1, z2)
        results.append((loss, *torch.autograd.grad(loss, (z1, z2))))
    for eager, traced in zip(*results):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_the_rows_in_every_direction(backend):
    """Also where both directions could be the symmetric loss, whose columns have the keys' ids."""
    z1, z2 = embeddings(4, 4)
    ids = {"query_ids": torch.tensor([0, 0, 1, 2]), "key_ids": torch.tensor([5, 6, 7, 8])}
    options = {"directions": ["qd", "dq"], "partition": "per_direction", "backend": backend, **ids}
    torch.testing.assert_close(fused_infonce(z1, z2, **options), fused_infonce(z1, z2, hardness=1e-12, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_key_that_is_equal_to_the_positive_is_not_above_it(backend, dtype):
    """Bounds of 0: listed keys and positives are dot products of one kind, so equal embeddings have equal similarities."""
    g = torch.Generator().manual_seed(0)
    z1 = torch.randn(100, 48, generator=g, dtype=torch.float64).to(dtype)
    positive = (z1 + torch.randn(100, 48, generator=g, dtype=torch.float64)).to(dtype)
    z2 = torch.cat([positive, positive])
    own = (torch.arange(101), torch.arange(100, 200))
    kept = fused_infonce(z1, z2, negatives=own, exclude_above=0.0, backend=backend, reduction="none").double()
    below = fused_infonce(z1, z2[:100], exclude_above=0.0, backend="reference", reduction="none").double()
    twin = torch.logaddexp(below, torch.zeros_like(below))  # which counts as the positive does
    torch.testing.assert_close(kept, twin, rtol=1e-4, atol=1e-5)
    guided = fused_infonce(
        z1, z2, negatives=own, guides=[(z1, z2)], backend=backend, reduction="none"
    ).double()  # fmt: skip
    torch.testing.assert_close(guided, twin, rtol=1e-4, atol=1e-5)


# --- log-sums ---

LOG_SUMS = [
    {}, {"include_positive": False}, {"temperature": 1.0, "include_positive": False},
    {"query_ids": torch.arange(9) % 3, "key_ids": torch.arange(20) % 3},
    {"query_ids": torch.arange(9) % 3, "key_ids": torch.arange(20) % 3, "include_positive": False},
    {"exclude_above": 0.3, "exclude_by": "constant", "positives": torch.arange(9) + 4},
    {"exclude_above": -0.2, "include_positive": False}, {"normalize": False, "temperature": 1.0},
]  # fmt: skip


def closed_form(z1, z2, temperature=0.05, positives=None, include_positive=True, query_ids=None, key_ids=None,
                exclude_above=None, exclude_by="absolute", normalize=True):  # fmt: skip
    if normalize:
        z1, z2 = (torch.nn.functional.normalize(z, dim=1) for z in (z1, z2))
    s, B = z1 @ z2.t(), len(z1)
    pos = torch.arange(B) if positives is None else positives
    positive = torch.arange(len(z2)) == pos[:, None]
    out = torch.zeros_like(positive)
    if query_ids is not None:
        out |= query_ids[:, None] == key_ids
    if exclude_above is not None:
        at = s.detach().gather(1, pos[:, None]) * (exclude_by == "absolute")
        out |= s.detach() > at + exclude_above
    kept = ~out | positive if include_positive else ~out & ~positive
    return (s / temperature).masked_fill(~kept, -torch.inf).logsumexp(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", LOG_SUMS, ids=lambda o: "+".join(o) or "plain")
def test_log_sums(options, backend, dtype):
    z1, z2 = embeddings(9, 20)
    a, b = (z.detach().to(dtype).requires_grad_() for z in (z1, z2))
    expected = closed_form(a.double(), b.double(), **options)
    upstream = torch.linspace(-1, 2, 9, dtype=torch.float64)
    truth = torch.autograd.grad(expected, (a, b), upstream)
    actual = logsumexp_similarities(a, b, backend=backend, **options)
    assert actual.shape == (9,) and actual.dtype == (dtype if dtype == torch.float64 else torch.float32)
    band = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}[dtype]
    assert (actual - expected).norm() <= band * expected.norm()
    for x, y in zip(torch.autograd.grad(actual, (a, b), upstream.to(actual.dtype)), truth):
        assert x.dtype == dtype and (x.double() - y.double()).norm() <= 2 * band * y.double().norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_keys(backend):
    z1, z2 = embeddings(3, 3)
    ids = torch.zeros(3, dtype=torch.long)
    total = logsumexp_similarities(z1, z2, query_ids=ids, key_ids=ids, include_positive=False, backend=backend)
    assert torch.isneginf(total).all()
    for gradient in torch.autograd.grad(total, (z1, z2), torch.ones(3, dtype=torch.float64)):
        assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_positive_any_number_of_keys(backend):
    z1, z2 = embeddings(9, 9)
    torch.testing.assert_close(
        logsumexp_similarities(z1, z2[:2], backend=backend), closed_form(z1, z2[:2]), rtol=1e-10, atol=0
    )
    with pytest.raises(ValueError, match="at least z1's 9 rows"):
        logsumexp_similarities(z1, z2[:2], include_positive=False, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_temperature_of_log_sums_trains(backend):
    z1, z2 = embeddings(9, 20)
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1, 2, 9, dtype=torch.float64)
    results = [
        torch.autograd.grad((weights * f).sum(), tau)[0]
        for f in (logsumexp_similarities(z1, z2, tau, backend=backend), closed_form(z1, z2, tau))
    ]
    torch.testing.assert_close(*results, rtol=1e-10, atol=0)


BAD = [
    ({"include_positive": 1}, TypeError, "include_positive must be True or False, got 1"),
    ({"temperature": -1.0}, ValueError, "temperature must be a finite number > 0, got -1.0"),
    ({"z1": [1.0]}, TypeError, "z1 must be a torch.Tensor"),
    ({"z1": torch.ones(3)}, ValueError, "z1 must have 2 dimensions"),
    ({"query_ids": torch.arange(4)}, ValueError, "key_ids must be given together with query_ids"),
    ({"positives": torch.arange(4) + 1}, ValueError, r"positives must lie in \[0, 3\] \(keys\), got 4"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:30])
def test_named_errors(change, error, message):
    z = torch.randn(4, 6)
    with pytest.raises(error, match=message):
        logsumexp_similarities(**{"z1": z, "z2": z, **change})


def examples() -> dict[str, str]:
    """The functions in docs/losses.md."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    return {re.search(r"def (\w+)", block)[1]: block for block in blocks if "def " in block}


def decoupled(s):
    """Yeh et al., eq. 5."""
    return (s.masked_fill(torch.eye(len(s), dtype=torch.bool), -torch.inf).logsumexp(1) - s.diagonal()).mean()


def debiased(s, prior=0.1, temperature=0.05):
    """Chuang et al., eq. 8, as their code has it: the estimate of the negatives' sum, no smaller than it can be."""
    N = len(s) - 1
    pos = s.diagonal().exp()
    neg = s.exp().masked_fill(torch.eye(len(s), dtype=torch.bool), 0).sum(1)
    estimate = ((neg - prior * N * pos) / (1 - prior)).clamp_min(N * torch.e ** (-1 / temperature))
    return -(pos / (pos + estimate)).log().mean()


@pytest.mark.parametrize("name, truth", [("decoupled", decoupled), ("debiased", debiased)])
@pytest.mark.parametrize("B", [12, 40])
def test_examples_of_the_documentation(name, truth, B):
    scope: dict = {}
    exec(examples()[name], scope)
    z1, z2 = embeddings(B, B)
    q, d = (torch.nn.functional.normalize(z, dim=1) for z in (z1, z2))
    expected, actual = truth(q @ d.t() / 0.05), scope[name](z1, z2, temperature=0.05)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    for x, y in zip(torch.autograd.grad(actual, (z1, z2)), torch.autograd.grad(expected, (z1, z2))):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-12)
