"""DistillCSE: the authors' golden vectors, every CPU backend against the float64 reference, and the shuffle's
distribution."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distillation import batch, check, results

from pycse import fused_distill, fused_distillcse, fused_focal_infonce, fused_infonce, grouping
from pycse.backends.cpu import distill as cpu
from pycse.backends.reference import distill as reference
from pycse.losses import DistillCSELoss, DistillLoss
from pycse.ops.distill import distill as op
from pycse.panels import distill as panel
from pycse.problem import Contrastive, Distillation, Grouping

BACKENDS = ["torch", "cpu"]


def coarse_logits(B, seed=0):
    """Teacher similarities on a grid, where every way of computing the groups agrees."""
    g = torch.Generator().manual_seed(seed)
    t = torch.randint(-30, 60, (B, B), generator=g).double() / 64
    return t.tril() + t.tril(-1).t()


CASES = [
    {"shuffle": "none"},
    {"group_p": 0.1},
    {"group_p": 0.25, "shuffle": "expected"},
    {"group_size": 5},
    {"group_size": 7, "shuffle": "expected"},
    {"span": (1, 2)},
    {"group_p": 1.0},
    {"group_p": 1e-7},
    {"group_p": 0.3, "group_temperature": 0.05},
    {"shuffle": "none", "student_temperature": 0.5, "teacher_temperature": 1.0},
    {"teacher_weights": [1, 3]},
    {"teacher_weights": [0, 1]},
    {"reduction": "none"},
    {"reduction": "sum"},
]


def label(options):
    return "-".join(f"{k}={v}" for k, v in options.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("divergence", ["ce", "kl", "js"])
@pytest.mark.parametrize("options", CASES, ids=label)
def test_options(options, divergence, dtype, backend):
    check(*batch(), backend, dtype, divergence=divergence, seed=5, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ["ce", "kl", "js"])
def test_low_precision(divergence, dtype, backend):
    check(*batch(65), backend, dtype, divergence=divergence, shuffle="none", teacher_temperature=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B", [2, 3, 15, 17, 64, 127, 300])
def test_shapes(B, backend):
    check(*batch(B, 37, teachers=(1, 37, 16)), backend, torch.float32, seed=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"shuffle": "none"}, {"shuffle": "expected"}, {"seed": 3}], ids=label)
@pytest.mark.parametrize("kind", ["zeros", "equal", "duplicates", "scales"])
def test_hostile(kind, options, backend):
    check(*batch(33, kind=kind), backend, torch.float64, **options)


@pytest.mark.parametrize("route", ["panels", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_panels_of_13_rows(backend, dtype, route, monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", {})
    monkeypatch.setattr(panel, "panel_rows", lambda d, *_: min(d.z1.shape[0], 13))
    if route == "blocks":  # teachers normalised a few keys at a time
        monkeypatch.setattr(panel, "TEACHER_BYTES", 0)
        monkeypatch.setattr(panel, "TEACHER_BLOCK", 10)
    options = {"shuffle": "none", "teacher_temperature": 0.1} if dtype == torch.bfloat16 else {"seed": 9}
    check(*batch(70), backend, dtype, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_panel(backend, monkeypatch):
    """Beyond the native small batches: symmetric blocks and one product for both sides."""
    monkeypatch.setattr(cpu, "SMALL", {})
    monkeypatch.setattr(panel, "SYMMETRIC_BLOCK", 16)
    monkeypatch.setattr(panel.gram, "__defaults__", (16,))
    check(*batch(70), backend, torch.float32, seed=2)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_one_sentence_has_nothing_to_distil(backend):
    z, teachers = batch(1)
    loss, dz = results(z, teachers, backend, torch.float64, seed=0)
    assert loss == 0 and (dz == 0).all()


# The authors' own code


def golden(folder, number):
    path = sorted(folder.glob(f"distill_{number:02d}_*.npz"))[0]
    kind = path.stem.split("_")[2]
    options = {"shuffle": "none"}
    if kind.startswith("prob"):
        options = {"group_p": float(kind[4:])}
    elif kind.startswith("size"):
        options = {"group_size": int(kind[4:])}
    elif kind.startswith("span"):
        options = {"span": tuple(int(n) for n in kind[4:].split("-"))}
    with np.load(path) as file:
        values = {name: torch.tensor(file[name]) for name in file.files}
    teachers = [values[f"teacher{k}"] for k in range(int(values["num_teachers"]))]
    return values, teachers, options


@pytest.mark.parametrize("number", range(20))
def test_reference_replays_the_authors_draw(number, golden_folder):
    v, teachers, options = golden(golden_folder, number)
    cut = pycse_grouping(options)
    z1, z2 = v["z1"].clone().requires_grad_(), v["z2"].clone().requires_grad_()
    B = z1.shape[0]
    weights = [1 / len(teachers)] * len(teachers)
    d = Distillation(z1, teachers, weights, grouping=cut or Grouping("mass", 0.1), shuffle="sample" if cut else "none")
    source = None
    if cut is not None:
        group = grouping.groups(reference.teacher_similarities(d), 0, cut, 1.0)
        source, at = torch.arange(B).repeat(B, 1), 0
        for i, sizes in enumerate(v["group_sizes"].view(B, -1).tolist()):
            rank = int(cut.value) if cut.kind == "span" else 0
            for number_of, n in enumerate(sizes):
                columns, permutation = v["descending_order"][i, rank : rank + n], v["permutations"][at : at + n]
                assert (group[i] == number_of).nonzero().flatten().tolist() == sorted(columns.tolist())
                source[i, columns[permutation]] = columns
                rank, at = rank + n, at + n
        assert at == len(v["permutations"])
    distillation = d.reduce(reference.losses(d, source))
    total = fused_infonce(z1, z2, float(v["temperature"]), backend="reference") + distillation
    total.backward()
    torch.testing.assert_close(distillation.detach(), v["loss_distill"].double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.detach(), v["loss_total"].double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z1.grad, v["grad_z1"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(z2.grad, v["grad_z2"], rtol=1e-9, atol=1e-12)


def pycse_grouping(options):
    if "group_p" in options:
        return Grouping("mass", options["group_p"])
    if "group_size" in options:
        return Grouping("size", float(options["group_size"]))
    return Grouping("span", float(options["span"][0]), options["span"][1]) if "span" in options else None


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("number", range(20))
def test_means_of_the_authors(number, backend, golden_folder):
    """ "none" exactly; "expected" within the standard error of their mean over many draws."""
    v, teachers, options = golden(golden_folder, number)
    z1, z2 = v["z1"].clone().requires_grad_(), v["z2"].clone().requires_grad_()
    if "shuffle" not in options:
        options["shuffle"] = "expected"
    out = fused_distillcse(z1, z2, teachers, float(v["temperature"]), backend=backend, **options)
    out.loss.backward()
    off = abs(out.distillation.item() - v["mean_loss_distill"].item())
    assert off <= 4 * v["sem_loss_distill"].item() + 1e-11
    gradient_off = (z1.grad - v["mean_grad_z1"]).norm() / v["mean_grad_z1"].norm()
    assert gradient_off <= (1e-12 if options["shuffle"] == "none" else 0.08)


# The shuffle


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{"group_p": 0.1}, {"group_p": 0.013}, {"group_size": 6}, {"span": (2, 40)}], ids=label
)
def test_same_seed_same_permutation_everywhere(options, threads, backend, monkeypatch):
    """js at a high temperature tells every q apart: equal losses and gradients mean equal permutations."""
    B, z = 150, batch(150)[0]
    logits = coarse_logits(B) + 1e-9 * torch.arange(B)  # the order of ties, without moving a boundary
    options = dict(teacher_logits=logits, seed=77, divergence="js", teacher_temperature=1.0, **options)

    def run(backend):
        x = z.clone().requires_grad_()
        loss = fused_distill(x, backend=backend, reduction="none", student_temperature=1.0, **options)
        loss.sum().backward()
        return loss.detach(), x.grad

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    expected, small = run("reference"), run(backend)
    monkeypatch.setattr(cpu, "SMALL", {})
    one_panel = run(backend)
    monkeypatch.setattr(panel, "panel_rows", lambda *_: 31)
    panels = run(backend)
    torch.set_num_threads(before)
    for actual in (small, one_panel, panels):
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-9, atol=1e-13)


def draws(n, how_many, backend, seed=0):
    """Permutations of a single group of n, read from the gradient: dL/ds_ij = (p_ij - q_ij) / tau."""
    B = n + 1
    eye = torch.eye(B, dtype=torch.float64)
    logits = torch.zeros(B, B, dtype=torch.float64)
    logits[:, :] = torch.arange(B).double() * 0.5
    found = []
    for k in range(how_many):
        S = eye.clone()
        d = Distillation(eye, [], [], logits=logits, grouping=Grouping("mass", 1.0), seed=seed + k, need=True)
        d.teacher_temperature = d.student_temperature = 1.0
        module = {"cpu": cpu, "torch": __import__("pycse.backends.torch.distill", fromlist=["Kernels"])}[backend]
        state = panel.State(1.0, torch.empty(B, dtype=torch.float64))
        module.Kernels(d, state).rows(S, logits, 0, True)
        q = 1 / n - S  # p is uniform: the student's similarities are all 0
        order = q.masked_fill(eye.bool(), -1).argsort(1, descending=True)[:, :n]
        columns = order - (order > torch.arange(B)[:, None]).long()  # without the diagonal
        found.append(columns)
    return torch.cat(found).tolist()


def chi_square(counts, cells, draws):
    expected = draws / cells
    statistic = sum((c - expected) ** 2 / expected for c in counts) + (cells - len(counts)) * expected
    freedom = cells - 1
    # Wilson and Hilferty's normal approximation of the chi-square distribution
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("n", range(2, 10))
def test_draws_are_uniform(n):
    """All n! for n <= 5; marginals and pairs up to 9. The normal deviate of chi-square stays below 4."""
    found = draws(n, 4000, "cpu")
    total = len(found)
    if n <= 5:
        counts = dict.fromkeys(itertools.permutations(range(n)), 0)
        for p in found:
            counts[tuple(p)] += 1
        assert chi_square(counts.values(), math.factorial(n), total) < 4
    x = np.array(found)
    for place in range(n):
        assert chi_square(np.bincount(x[:, place], minlength=n), n, total) < 4
    for a, b in itertools.combinations(range(n), 2):
        if n > 2:
            pairs = np.bincount(x[:, a] * n + x[:, b], minlength=n * n).reshape(n, n)
            assert chi_square(pairs[~np.eye(n, dtype=bool)], n * (n - 1), total) < 4.5


def test_torch_backend_draws_the_same():
    assert draws(7, 40, "torch") == draws(7, 40, "cpu")


@pytest.mark.parametrize("options", [{"group_p": 0.2}, {"group_size": 5}, {"span": (3, 11)}], ids=label)
def test_never_across_groups_and_average_to_expected(options):
    cut = pycse_grouping(options)
    logits = coarse_logits(21)
    group = grouping.groups(logits, 0, cut, 1.0)
    total = torch.zeros(21, 21, dtype=torch.float64)
    q = torch.rand(21, 21, dtype=torch.float64)
    for seed in range(3000):
        source = grouping.shuffled(group, 0, seed)
        assert torch.equal(group.gather(1, source), group)
        assert torch.equal(source.sort(1).values, torch.arange(21).expand(21, -1))
        total += q.gather(1, source)
    assert (total / 3000 - reference.averaged(q, group)).abs().max() < 0.04


@pytest.mark.parametrize("divergence", ["ce", "kl"])
def test_sample_averages_to_expected(divergence):
    z, teachers = batch(24)
    runs = [results(z, teachers, "cpu", torch.float64, divergence=divergence, seed=s) for s in range(800)]
    losses, gradients = torch.stack([r[0] for r in runs]), torch.stack([r[1] for r in runs])
    expected = results(z, teachers, "cpu", torch.float64, divergence=divergence, shuffle="expected")
    assert (losses.mean() - expected[0]).abs() < 4 * losses.std() / math.sqrt(800)
    error = gradients.std(0) / math.sqrt(800)
    assert ((gradients.mean(0) - expected[1]).abs() <= 5.5 * error + 1e-9).all()


def test_philox_known_answers():
    """Random123's own vectors for philox4x32-10: counter and key of zeros, of ones, and of pi."""
    for counter, key, expected in (
        ((0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2 + (2**64 - 1,), 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x0370734413198A2E),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        block, group, row = (torch.tensor(c if c < 2**63 else c - 2**64) for c in counter)
        words = [grouping.philox(key, block, group, row, torch.tensor(w)).item() for w in range(4)]
        assert tuple(words) == expected


@pytest.mark.parametrize("seed", [None, "generator", "tensor"])
def test_where_seeds_come_from(seed):
    z, teachers = batch()

    def loss():
        torch.manual_seed(11)
        given = {
            None: None,
            "generator": torch.Generator().manual_seed(3),
            "tensor": torch.tensor(123),
        }[seed]
        return [fused_distill(z, teachers, seed=given, backend=b).item() for b in ("cpu", "cpu")]

    first, second = loss(), loss()
    assert first == second
    if seed is None:
        assert first[0] != first[1]
    if seed == "tensor":
        assert first[0] == fused_distill(z, teachers, seed=123, backend="cpu").item()


# The total


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("m", [None, 0.3])
def test_total_is_the_sum_of_its_parts(m, backend):
    z, teachers = batch(20)
    z2 = torch.cat([z + 0.1, z.flip(0)])
    options = dict(query_ids=torch.arange(20) % 7, key_ids=torch.arange(40) % 7, hard_negative_weight=0.5)
    weight = torch.linspace(0, 1, 20, dtype=torch.float64).requires_grad_()
    x1, x2 = z.clone().requires_grad_(), z2.clone().requires_grad_()
    tau = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    out = fused_distillcse(
        x1, x2, teachers, tau, m, distill_weight=0.7, seed=4, weight=weight, backend=backend, **options
    )
    out.loss.backward()
    w = weight.detach().clone().requires_grad_()
    y1, y2, t = z.clone().requires_grad_(), z2.clone().requires_grad_(), tau.detach().clone().requires_grad_()
    if m is None:
        a = fused_infonce(y1, y2, t, weight=w, backend="reference", **options)
    else:
        a = fused_focal_infonce(y1, y2, t, m, weight=w, backend="reference", **options)
    b = fused_distill(y1, teachers, seed=4, weight=w, backend="reference")
    (a + 0.7 * b).backward()
    torch.testing.assert_close(out.contrastive, a.detach())
    torch.testing.assert_close(out.distillation, b.detach())
    torch.testing.assert_close(out.loss, (a + 0.7 * b).detach())
    for ours, theirs in ((x1, y1), (x2, y2), (tau, t), (weight, w)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert not out.contrastive.requires_grad and not out.distillation.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_z1_as_z2(reduction, backend):
    z, teachers = batch(20)
    grads = []
    for b in ("reference", backend):
        x = z.clone().requires_grad_()
        loss = fused_distillcse(x, x, teachers, seed=4, reduction=reduction, backend=b).loss
        loss.sum().backward(retain_graph=True)
        once = x.grad.clone()
        loss.sum().backward()
        torch.testing.assert_close(x.grad, 2 * once)
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    z, teachers = batch(20)
    x2 = z.clone().requires_grad_()
    fused_distillcse(z, x2, teachers, seed=4, backend=backend).loss.backward()
    assert x2.grad is not None
    with torch.no_grad():
        out = fused_distillcse(z, x2, teachers, seed=4, backend=backend)
    assert not out.loss.requires_grad


def test_double_backward_says_what_to_do():
    z, teachers = batch(12)
    z.requires_grad_()
    (g,) = torch.autograd.grad(fused_distill(z, teachers, seed=1), z, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        g.sum().backward()


def test_reference_gradcheck():
    z, teachers = batch(6, 5, teachers=(4,))
    for divergence, shuffle in itertools.product(("ce", "kl", "js"), ("none", "sample", "expected")):

        def loss(z, divergence=divergence, shuffle=shuffle):
            return fused_distill(
                z,
                teachers,
                seed=1,
                divergence=divergence,
                shuffle=shuffle,
                student_temperature=0.5,
                backend="reference",
            )

        assert torch.autograd.gradcheck(loss, z.clone().requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    z, teachers = batch(10, dtype=torch.float32)
    z.requires_grad_()
    z2 = z.detach().clone().requires_grad_()
    p, d = Contrastive(z, z2, 0.05), Distillation(z, teachers, [0.5, 0.5], seed=torch.tensor(5))
    args = (*op.arguments.flat(p, d, backend=backend, validate=False), [False] * 5)
    torch.library.opcheck(op.op, args)


@pytest.mark.clean_memory
def test_compiles_without_a_graph_break():
    z, teachers = batch(16, dtype=torch.float32)

    def step(z):
        out = fused_distillcse(z, z * 1.1, teachers, seed=3)
        return out.loss, out.distillation

    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    expected = step(x)
    expected[0].backward()
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(y)
    actual[0].backward()
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(y.grad, x.grad)


def test_autocast_casts_student_and_teachers():
    z, teachers = batch(40, dtype=torch.float32)
    x = z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_distill(x, teachers, shuffle="none")
    loss.backward()
    low = z.bfloat16().requires_grad_()
    other = fused_distill(low, [e.bfloat16() for e in teachers], shuffle="none")
    other.backward()
    assert loss == other and x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, low.grad.float())


def test_teachers_of_other_types_than_the_student():
    z, teachers = batch(40, dtype=torch.float32)
    mixed = [teachers[0].bfloat16(), teachers[1].double()]
    for backend in BACKENDS:
        loss = fused_distill(z, mixed, shuffle="none", backend=backend)
        exact = fused_distill(z.double(), [e.double() for e in mixed], shuffle="none", backend="reference")
        assert abs(loss - exact) < 1e-4 * exact


def test_as_vectorised_pytorch_writes_it():
    """An independent formulation without a shuffle."""
    z, teachers = batch(25)
    eye = torch.eye(25, dtype=torch.bool)
    s = (F.normalize(z, dim=1) @ F.normalize(z, dim=1).t()).masked_fill(eye, -1e9) / 0.025
    t = sum(F.normalize(e, dim=1) @ F.normalize(e, dim=1).t() for e in teachers) / 2
    q = (t.masked_fill(eye, -1e9) / 0.0125).softmax(1)
    expected = -(q * s.log_softmax(1)).sum(1).mean()
    for backend in ["reference", *BACKENDS]:
        torch.testing.assert_close(fused_distill(z, teachers, shuffle="none", backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("divergence", ["ce", "kl", "js"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bad_rows_stay_bad_and_end(value, divergence, dtype, backend):
    z, teachers = batch(20, dtype=dtype)
    teachers[0][3] = value
    loss = fused_distill(z.requires_grad_(), teachers, seed=0, divergence=divergence, backend=backend)
    assert loss.isnan()
    loss.backward()
    assert z.grad.isnan().any()
    logits = coarse_logits(20)
    logits[2, 5] = -torch.inf  # a pair the teacher rules out
    assert fused_distill(z, teacher_logits=logits, seed=0, backend=backend).isfinite()


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7FFFFFFF])  # the second is what NVIDIA GPUs make
def test_any_nan_is_a_nan(bits):
    """A NaN's payload must not turn it into a number in the kernels' exponential."""
    bad = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    logits = coarse_logits(20).float()
    logits[2, 5] = bad
    z = torch.randn(20, 8)
    rows = fused_distill(z, teacher_logits=logits, seed=0, reduction="none", backend="cpu")
    assert rows.isnan().nonzero().tolist() == [[2]]
    keys = torch.randn(40, 8)
    keys[30, 3] = bad
    assert fused_infonce(z, keys, reduction="none", backend="cpu").isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_counts_on_before_backward(backend):
    z, teachers = batch(20)
    z.requires_grad_()
    seed = torch.tensor(4)
    loss = fused_distill(z, teachers, seed=seed, backend=backend)
    seed.add_(1)
    (first,) = torch.autograd.grad(loss, z)
    (second,) = torch.autograd.grad(fused_distill(z, teachers, seed=4, backend=backend), z)
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_groups(backend):
    """Beyond what numbers of groups hold: the smallest P is no shuffle (no ties here), the largest size one group."""
    z, teachers = batch(20)
    find = lambda **options: fused_distill(z, teachers, seed=1, backend=backend, **options)  # noqa: E731
    for P in (2**-30, 1e-20, 5e-324):
        torch.testing.assert_close(find(group_p=P), find(shuffle="none"))
    torch.testing.assert_close(find(group_size=10**30), find(group_size=19))


def test_integers_of_numpy_are_integers():
    z, teachers = batch(20)
    one, expected = np.int64(1), fused_distill(z, teachers, seed=1, span=(1, 9))
    assert fused_distill(z, teachers, seed=one, span=(one, np.int32(9))) == expected
    assert fused_distill(z, teachers, seed=np.uint64(2**64 - 1)) == fused_distill(z, teachers, seed=-1)
    assert fused_distill(z, teachers, seed=1, group_size=np.int64(4)) == fused_distill(
        z, teachers, seed=1, group_size=4
    )


@pytest.mark.clean_memory
def test_large_tied_rows_end():
    """All-equal teachers put every column in one bin: ranking it must not take B^2 steps."""
    z = torch.randn(3000, 8)
    assert fused_distill(z, [torch.ones(3000, 4)], seed=0, backend="cpu").isfinite()


# Modules and bad input


def test_values_are_checked_before_any_work(monkeypatch):
    monkeypatch.setattr(cpu, "distill", lambda d: pytest.fail("distilled before the positives were looked at"))
    z, teachers = batch(8)
    with pytest.raises(ValueError, match="positives"):
        fused_distillcse(z, z, teachers, positives=torch.arange(8) + 1, seed=1, backend="cpu")


def test_modules_hold_configuration():
    z, teachers = batch(20)
    module = DistillLoss(group_size=4, divergence="kl")
    assert module(z, teachers, seed=1) == fused_distill(z, teachers, seed=1, group_size=4, divergence="kl")
    tau = torch.nn.Parameter(torch.tensor(0.05, dtype=torch.float64))
    both = DistillCSELoss(tau, m=0.2, shuffle="expected")
    assert list(both.parameters()) == [tau]
    expected = fused_distillcse(z, z, teachers, 0.05, 0.2, shuffle="expected")
    torch.testing.assert_close(both(z, z, teachers).loss.detach(), expected.loss)
    assert "shuffle='expected'" in repr(both)
    for make in (lambda: DistillLoss(seed=1), lambda: DistillLoss(grup_p=0.1), lambda: DistillCSELoss(teachers=[])):
        with pytest.raises(TypeError, match="option"):
            make()
    with pytest.raises(ValueError, match="group_p"):
        DistillCSELoss(group_p=2)


E = torch.randn(8, 4)
BAD = [
    ({"teachers": []}, ValueError, "teachers must hold at least one"),
    ({"teachers": None}, ValueError, "neither"),
    ({"teachers": E}, TypeError, "list of embeddings"),
    ({"teachers": [E[:7]]}, ValueError, r"teachers\[0\].*8 rows.*\(7, 4\)"),
    ({"teachers": [E, E.long()]}, TypeError, r"teachers\[1\].*int64"),
    ({"teachers": [E.clone().requires_grad_()]}, ValueError, r"teachers\[0\].*detach"),
    ({"teacher_logits": torch.zeros(8, 8)}, ValueError, "both"),
    ({"teachers": None, "teacher_logits": torch.zeros(8, 7)}, ValueError, r"teacher_logits.*\(8, 8\)"),
    ({"teacher_weights": [-1.0]}, ValueError, r"teacher_weights\[0\].*>= 0.*-1.0"),
    ({"teacher_weights": [math.nan]}, ValueError, r"teacher_weights\[0\].*finite.*nan"),
    ({"teacher_weights": [0.0]}, ValueError, "finite sum > 0"),
    ({"teacher_weights": [1.0, 2.0]}, ValueError, "1 numbers"),
    ({"teacher_weights": np.ones(1)}, TypeError, "teacher_weights must be a list"),
    ({"group_p": 0.0}, ValueError, r"group_p.*\(0, 1\].*0.0"),
    ({"group_p": 1.5}, ValueError, "group_p.*1.5"),
    ({"group_p": math.nan}, ValueError, "group_p"),
    ({"group_size": 0}, ValueError, "group_size.*at least 1.*0"),
    ({"group_size": 2.5}, TypeError, "group_size.*integer"),
    ({"span": (3, 3)}, ValueError, "span.*start < end"),
    ({"span": (0, 8)}, ValueError, "span.*B - 1 = 7"),
    ({"span": 3}, TypeError, "span"),
    ({"group_p": 0.1, "group_size": 3}, ValueError, "group_p and group_size exclude"),
    ({"shuffle": "mean"}, ValueError, "shuffle.*'expected'.*'mean'"),
    ({"divergence": "mse"}, ValueError, "divergence.*'js'.*'mse'"),
    ({"student_temperature": 0.0}, ValueError, "student_temperature.*> 0"),
    ({"teacher_temperature": torch.tensor(1.0)}, TypeError, "teacher_temperature must be a number"),
    ({"seed": 1.5}, TypeError, "seed"),
    ({"seed": torch.tensor([1])}, TypeError, "seed"),
    ({"seed": 2**64}, ValueError, "seed.*64 bits"),
    ({"weight": torch.ones(3)}, ValueError, r"weight.*\(8,\)"),
    ({"reduction": "avg"}, ValueError, "reduction"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options, error, message", BAD)
def test_bad_input(options, error, message, backend):
    options = {"teachers": [E], "backend": backend, **options}
    teachers = options.pop("teachers")
    with pytest.raises(error, match=message):
        fused_distill(torch.randn(8, 16), teachers, **options)
    with pytest.raises(error, match=message):
        fused_distillcse(torch.randn(8, 16), torch.randn(8, 16), teachers, **options)
