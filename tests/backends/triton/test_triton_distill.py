"""The Triton backend of the distillation against the float64 reference.

As test_triton.py: on a CUDA GPU where there is one, and in any case once more in a process of its own with
TRITON_INTERPRET=1 on CPU tensors. That the kernels compile is tests/helpers/triton_compile.py's, which test_triton.py runs.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.language", reason="triton is not installed: pip install 'pycse-kernels[triton]'")

from cuda_graphs import capture
from interpreter import INTERPRETED, run_interpreted

from pycse import fused_distill, fused_distillcse, grouping
from pycse.panels import distill as panel
from pycse.problem import Distillation, Grouping

from oracle import BAND

ours = importlib.import_module("pycse.backends.triton.distill")
norms = importlib.import_module("pycse.backends.triton.norms")
plain = importlib.import_module("pycse.backends.torch.distill")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_in_the_interpreter():
    run_interpreted(__file__, 80)


def inputs(
    B: int, kind: str = "random", D: int = 24, widths: tuple[int, ...] = (20, 31)
) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(B)
    z, *teachers = (torch.randn(B, n, generator=g, dtype=torch.float64) for n in (D, *widths))
    if kind == "ties":  # equal similarities in every row
        for e in teachers:
            e[1::2] = e[: B - 1 : 2][: len(e[1::2])]
    elif kind == "equal":
        for e in (z, *teachers):
            e[:] = e[0].clone()
    elif kind == "zeros":
        teachers[0][:], teachers[1][0], z[1] = 0, 0, 0
    elif kind == "scales":
        scale = 10 ** torch.linspace(-8, 8, B, dtype=torch.float64)[:, None]
        z, teachers = z * scale, [e / scale for e in teachers]
    return z, teachers


def logits_of(B: int, parts: int = 64, seed: int = 0) -> Tensor:
    """Multiples of 1/parts: every type and every order of additions gives the same, and many are equal."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-parts, parts + 1, (B, B), generator=g).double() / parts


def run(backend: str, z: Tensor, teachers: list[Tensor] | None = None, **options: Any) -> tuple[Tensor, ...]:
    """Loss, dz and, with a weight, dweight, for an upstream gradient that is not 1."""
    z = z.detach().clone().requires_grad_()
    leaves = [z]
    if "weight" in options:
        options["weight"] = options["weight"].clone().requires_grad_()
        leaves.append(options["weight"])
    loss = fused_distill(z, teachers, backend=backend, **{"seed": 5, "teacher_temperature": 0.1, **options})
    loss.backward(torch.linspace(0.5, 3, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape))
    return loss.detach(), *(leaf.grad for leaf in leaves)


def check(
    z: Tensor, teachers: list[Tensor] | None, device: str, dtype=torch.float64, band=None, **options: Any
) -> None:
    """``dtype`` of the embeddings; logits stay in their own."""
    put = lambda x, t: x.to(device=device, dtype=t)  # noqa: E731
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    z = z.to(dtype)
    teachers = None if teachers is None else [e.to(dtype) for e in teachers]
    truth = run("reference", z.double(), None if teachers is None else [e.double() for e in teachers], **options)
    actual = run("triton", put(z, dtype), None if teachers is None else [put(e, dtype) for e in teachers], **moved)
    for x, y in zip(actual, truth):
        y = y.double()
        floor = 1e-2 * y.numel() ** 0.5  # gradients that cancel leave the rounding of 1 / tau = 40
        assert x.isfinite().all()
        assert (x.double().cpu() - y).norm() <= (band or 10 * BAND[dtype]) * max(y.norm().item(), floor)


def cuts(B: int) -> list[dict[str, Any]]:
    return [{"group_p": 0.1}, {"group_size": 3}, {"span": ((B - 1) // 3, B - 1 - B // 4)}]


ALL = [
    {"divergence": divergence, "shuffle": shuffle, **cut}
    for divergence in ("ce", "kl", "js")
    for shuffle in ("sample", "expected", "none")
    for cut in (cuts(17) if shuffle != "none" else [{}])
]
TABLE = [(17, options) for options in ALL]
for size in (2, 3):
    for n, options in enumerate(ALL):
        if n % 2 == size % 2 and "span" not in options:
            TABLE.append((size, options))
    TABLE += [(size, {"shuffle": shuffle, "span": (0, size - 1)}) for shuffle in ("sample", "expected")]
TABLE += [(64, {"group_size": 16}), (64, {"shuffle": "expected", "divergence": "kl"})]


@pytest.mark.parametrize("B, options", TABLE, ids=str)
def test_table(B, options, device):
    check(*inputs(B), device, **options)


HARD = [
    ("ties", {"group_p": 0.25}),
    ("ties", {"shuffle": "expected", "group_size": 4}),
    ("equal", {"group_p": 0.3}),
    ("equal", {"shuffle": "expected", "divergence": "js"}),
    ("zeros", {"group_p": 0.1}),
    ("zeros", {"shuffle": "expected", "divergence": "kl"}),
    ("scales", {"group_size": 5, "divergence": "js"}),
    ("random", {"weight": torch.linspace(0, 2, 9, dtype=torch.float64)}),
    ("random", {"weight": torch.linspace(0, 2, 9, dtype=torch.float64), "reduction": "none", "shuffle": "expected"}),
    ("random", {"reduction": "sum", "teacher_weights": [0.9, 0.1], "group_temperature": 0.3}),
    ("random", {"teacher_temperature": 0.0125, "student_temperature": 0.01, "divergence": "kl"}),
    ("random", {"group_size": 1}),
    ("random", {"group_size": 1000}),
    ("random", {"group_p": 1.0}),
    ("random", {"group_p": 1e-12}),
]


@pytest.mark.parametrize("kind, options", HARD, ids=str)
def test_hard_cases(kind, options, device):
    check(*inputs(9, kind), device, **options)


@pytest.mark.parametrize("options", [ALL[0], ALL[4], ALL[-1]], ids=str)
def test_float32(options, device):
    check(*inputs(17), device, torch.float32, **options)


@pytest.mark.parametrize("options", [{}, {"shuffle": "expected", "group_size": 3}, {"divergence": "js"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(options, dtype, device):
    """Given logits the groups are exact; the interpreter truncates bfloat16, which a low temperature would magnify."""
    options = {**options, "student_temperature": 0.2}
    check(inputs(9)[0], None, device, dtype, 5e-2, teacher_logits=logits_of(9), **options)
    check(*inputs(9), device, dtype, 5e-2, **{**options, "shuffle": "none", "teacher_temperature": 0.3})


@pytest.mark.parametrize("student, teacher", [("float32", "float64"), ("float64", "float32"), ("float32", "bfloat16")])
def test_teachers_of_another_type(student, teacher, device):
    z, teachers = inputs(12)
    z, teachers = z.to(getattr(torch, student)), [teachers[0].to(getattr(torch, teacher)), teachers[1].float()]
    options = {"group_size": 4, "shuffle": "expected", "teacher_temperature": 0.3}
    truth = run("torch", z, teachers, **options)
    actual = run("triton", z.to(device), [e.to(device) for e in teachers], **options)
    for x, y in zip(actual, truth):
        assert x.dtype == y.dtype
        assert (x.cpu() - y).norm() < 1e-5 * y.norm()


def kernels(kind: type[panel.Kernels], B: int, device: str, dtype=torch.float64, **options: Any) -> panel.Kernels:
    d = Distillation(torch.zeros(B, 1, dtype=dtype, device=device), [], [], **options)
    state = panel.State(
        torch.linspace(0.1, 1, B, dtype=d.acc, device=device), torch.full((B,), torch.nan, dtype=d.acc, device=device)
    )
    return kind(d, state)  # fmt: skip


SEEDS = [1, -1, 2**31, 2**63 - 1, -(2**40) - 6]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("cut", [Grouping("mass", 0.1), Grouping("size", 7.0), Grouping("span", 3.0, 30)], ids=str)
def test_permutations_bitwise(cut, tensor, seed, device):
    """Those of pycse.grouping, rows from i0 on, in each type."""
    B, i0, c = 41, 11, 5
    dtype = (torch.float32, torch.float64)[seed % 2]
    T = logits_of(B, seed=seed % 100)[i0 : i0 + c].to(dtype)
    group = grouping.groups(T, i0, cut, 1.0)
    expected = grouping.shuffled(group, i0, torch.tensor(seed) if tensor else seed)
    given = torch.tensor(seed, device=device) if tensor else seed
    k = kernels(ours.Kernels, B, device, dtype, grouping=cut, seed=given)
    x = k.sources(T.to(device), i0).cpu().long()
    i = torch.arange(i0, i0 + c)[:, None]
    actual = i.expand(c, B).clone()
    columns = torch.arange(B - 1).expand(c, -1)
    actual.scatter_(1, columns + (columns >= i), x + (x >= i))
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, torch.arange(B).expand(c, -1))


def test_groups_bitwise(device):
    """Groups alone, where masses and boundaries meet exactly: equal similarities, and -inf."""
    for B, P, value in ((21, 0.1, 0.5), (21, 0.05, 0.5), (11, 0.3, -torch.inf), (9, 0.125, torch.nan)):
        T = torch.full((B, B), value, dtype=torch.float64)
        T[:, 3::4] = 0.5
        k = kernels(ours.Kernels, B, device, grouping=Grouping("mass", P))
        ranked, order = ours.others(T.to(device), 0, torch.float64).sort(dim=1, descending=True, stable=True)
        expected = ours.others(grouping.groups(T, 0, Grouping("mass", P), 1.0), 0, torch.int32)
        assert torch.equal(k._group(ranked, order).cpu(), expected)


@pytest.mark.parametrize("options", [{}, {"shuffle": "expected"}, {"shuffle": "none", "divergence": "js"}], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_rows_alone(options, grad, device):
    """Beside the torch backend's: rows from i0 on of a wide panel, whose T is bfloat16 and strided."""
    B, i0, c = 23, 6, 4
    S = logits_of(B, seed=1)[i0 : i0 + c]
    T = logits_of(B, 32, seed=2)[i0 : i0 + c].bfloat16()
    wide = torch.full((c, B + 9), torch.nan, dtype=torch.bfloat16)
    wide[:, :B] = T
    results = []
    for kind, where in ((ours.Kernels, device), (plain.Kernels, "cpu")):
        k = kernels(kind, B, where, student_temperature=0.3, teacher_temperature=0.2, seed=3, **options)
        s = S.to(where, copy=True)
        k.rows(s, wide.to(where)[:, :B], i0, grad)
        assert k.state.loss[:i0].isnan().all() and k.state.loss[i0 + c :].isnan().all()
        results.append((k.state.loss[i0 : i0 + c].cpu(), s.cpu()))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
    assert grad != torch.equal(results[0][1], S)


@pytest.mark.parametrize("options", [ALL[0], ALL[3], {"divergence": "js", "span": (3, 22)}], ids=str)
def test_panels_of_13_rows_in_blocks_of_32(options, device, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda d, _: 13)
    monkeypatch.setattr(ours, "RANKED", 5 * 28)
    monkeypatch.setattr(ours, "FLAT", 64)
    for module in (ours, norms):
        monkeypatch.setattr(module, "block_of", lambda n: 32)
    check(*inputs(28, D=40), device, **options)


def test_teachers_too_wide_to_keep(device, monkeypatch):
    monkeypatch.setattr(panel, "TEACHER_BYTES", 0)
    monkeypatch.setattr(panel, "TEACHER_BLOCK", 7)
    check(*inputs(17), device)


@pytest.mark.parametrize("shuffle", ["sample", "expected", "none"])
def test_infinite_teacher_logits(shuffle, device):
    """-inf takes a column out; it ranks beside the diagonal."""
    t = logits_of(9)
    t[2, ::2], t[5, 1:8] = -torch.inf, -torch.inf
    for options in ({"group_size": 3}, {"group_p": 0.3}):
        check(inputs(9)[0], None, device, teacher_logits=t, shuffle=shuffle, divergence="kl", **options)


@pytest.mark.parametrize("shuffle", ["sample", "expected", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_give_nan(shuffle, value, device):
    z, teachers = (inputs(9)[0].to(device), [e.to(device) for e in inputs(9)[1]])
    for bad in (z, teachers[0]):
        bad[3, 5] = value
        loss = fused_distill(z.clone().requires_grad_(), teachers, shuffle=shuffle, backend="triton", seed=1)
        loss.backward()
        assert loss.isnan()
        bad[3, 5] = 0


def test_one_row_has_no_pair(device):
    loss, dz = run("triton", torch.ones(1, 4, device=device), [torch.ones(1, 3, device=device)])
    assert loss == 0 and (dz == 0).all()


def test_same_seed_same_bits_and_another_seed_others(device):
    z, teachers = inputs(12)
    z, teachers = z.float().to(device), [e.float().to(device) for e in teachers]
    first, again, other = (run("triton", z, teachers, seed=torch.tensor(s, device=device)) for s in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert not torch.equal(first[1], other[1])


def test_beside_the_contrastive_loss(device):
    z, teachers = inputs(12)
    z2 = z.flip(1).clone()
    results = []
    for backend, where in (("reference", "cpu"), ("triton", device)):
        a, b = (x.clone().to(where).requires_grad_() for x in (z, z2))
        out = fused_distillcse(a, b, [e.to(where) for e in teachers], distill_weight=0.7, seed=2, backend=backend)
        out.loss.backward()
        results.append((*out, a.grad, b.grad))
    for x, y in zip(*results):
        torch.testing.assert_close(x.detach().cpu(), y.detach().cpu(), rtol=1e-9, atol=1e-11)


CALLS = [{}, {"shuffle": "expected"}, {"shuffle": "none", "divergence": "js"}, {"group_size": 16, "divergence": "kl"}]


def student_and_teachers(device: str) -> tuple[Tensor, list[Tensor]]:
    z, *teachers = (torch.randn(300, n, device=device, dtype=torch.bfloat16) for n in (64, 48, 80))
    return z.requires_grad_(), teachers


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.clean_memory
def test_no_wait_for_the_device(options, cuda):
    z, teachers = student_and_teachers(cuda)
    seed = torch.tensor(3, device=cuda)
    fused_distill(z, teachers, backend="triton", seed=seed, **options).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_distill(z, teachers, backend="triton", seed=seed, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.clean_memory
def test_cuda_graph_draws_anew_when_the_seed_changes(options, cuda):
    z, teachers = student_and_teachers(cuda)
    seed = torch.tensor(3, device=cuda)

    def step() -> Tensor:
        z.grad = None
        loss = fused_distill(z, teachers, backend="triton", seed=seed, **options)
        loss.backward()
        return loss

    replay = capture(step)
    captured = z.grad
    for s in (3, 2**40 + 1):
        seed.fill_(s)
        replayed = replay().detach().clone(), captured.clone()
        eager = step().detach()
        assert torch.equal(replayed[0], eager) and torch.equal(replayed[1], z.grad)
