"""The CUDA backend's distillation. Its bodies run everywhere, on one host thread, and are held to the float64
reference; with a GPU the same table runs on the device. The groups are those of pycse/grouping.py, member by member."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import emulation
import pytest
import torch

from pycse import fused_distill, fused_distillcse, grouping
from pycse.backends.cpu import distill as cpu
from pycse.backends.cuda import distill as cuda
from pycse.backends.torch import distill as eager
from pycse.panels import distill as panel
from pycse.problem import Distillation, Grouping

# Norm-wise, of the loss and of dz. A bf16 panel rounds s by 2^-9, which 1/tau = 40 makes 0.08 in a logit.
BAND = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2}
SIZES = (2, 3, 17, 64, 257)
SHUFFLES = ("sample", "expected", "none")
DIVERGENCES = ("ce", "kl", "js")
GROUPINGS = (
    {"group_p": 0.1},
    {"group_p": 0.37},
    {"group_p": 1.0},
    {"group_size": 1},
    {"group_size": 7},
    {"span": (0, 1)},
    {"span": (1, 40)},
)


class Emulated(cuda.Kernels):
    @staticmethod
    def native():
        return emulation.kernels()


@pytest.fixture
def emulated(monkeypatch):
    emulation.instead(monkeypatch, cpu, "distill", lambda d: panel.distill(d, Emulated))


def student(B: int, D: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coarse(B: int, seed: int = 1, steps: int = 64) -> torch.Tensor:
    """Similarities that are multiples of 1/64: exact in every dtype, with many ties."""
    t = torch.randint(-steps, steps + 1, (B, B), generator=torch.Generator().manual_seed(seed)) / 64
    return torch.triu(t) + torch.triu(t, 1).t()


@dataclass
class Case:
    B: int
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "logits"

    def __str__(self) -> str:
        named = (f"{k}={v}" if not isinstance(v, torch.Tensor) else k for k, v in self.options.items())
        return "-".join([str(self.B), self.kind, *named])

    @property
    def rounding(self) -> bool:
        """Whether the teachers' rounding moves members to other groups."""
        return self.kind in ("teachers", "smooth logits")

    def inputs(self) -> dict[str, Any]:
        B, options = self.B, {"seed": 1234567890123, **self.options}
        if "span" in options:
            start, end = options["span"]
            options["span"] = (min(start, B - 2), max(min(end, B - 1), min(start, B - 2) + 1))
        teachers = [student(B, 5, 2) + 1, student(B, 33, 3)]
        if self.kind == "logits":
            options["teacher_logits"] = coarse(B)
        elif self.kind == "smooth logits":
            unit = torch.nn.functional.normalize(teachers[1], dim=1)
            options["teacher_logits"] = unit @ unit.t()
        elif self.kind == "equal":
            options["teacher_logits"] = torch.full((B, B), 0.25)
        elif self.kind == "two values":
            options["teacher_logits"] = coarse(B, steps=1).sign() / 4
        elif self.kind == "outlier":  # all but one column in a bin or two
            options["teacher_logits"] = coarse(B) / 4096
            options["teacher_logits"][:, B // 2] = 1
        elif self.kind == "-inf":
            options["teacher_logits"] = torch.where(coarse(B) < -0.5, -torch.inf, coarse(B))
            options["teacher_logits"][:, :2] = 0.5
        elif self.kind == "zeros":  # rows without a direction
            teachers[0][0] = 0
            teachers[1][:2] = 0
            options["teachers"] = teachers
        else:
            options["teachers"] = teachers
            options.setdefault("teacher_weights", [1.0, 3.0])
        return options


def weights(B: int) -> torch.Tensor:
    return torch.linspace(0, 2, B, dtype=torch.float64)


TABLE = [
    *(
        Case(B, {**g, "shuffle": s, "divergence": v})
        for B, s, v, g in itertools.product(SIZES, SHUFFLES, DIVERGENCES, GROUPINGS)
        if s != "none" and (B == 17 or v == "ce" or g == GROUPINGS[1]) or s == "none" and g == GROUPINGS[0]
    ),
    *(Case(B, {"shuffle": s}, k) for B in (17, 130) for s in SHUFFLES[:2]
      for k in ("smooth logits", "equal", "two values", "outlier", "-inf", "zeros", "teachers")),
    *(Case(40, {"weight": weights(40), "reduction": r, "divergence": v}) for r in ("mean", "sum", "none") for v in DIVERGENCES),
    *(Case(B, {"group_p": 1e-3, "seed": s}) for B in (17, 1030) for s in (-1, 0, 2**62)),
    Case(33, {"student_temperature": 1.0, "teacher_temperature": 0.5, "group_temperature": 0.02}, "smooth logits"),
    Case(33, {"seed": torch.tensor(-(2**40))}),
]  # fmt: skip


def run(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu", exact: bool = False):
    """Loss and dz; ``exact`` promotes the dtype's values to float64."""
    z = student(case.B).to(dtype)
    z = (z.double() if exact else z).to(device).requires_grad_()
    options = case.inputs()
    if "teachers" in options:
        options["teachers"] = [(e.to(dtype).double() if exact else e.to(dtype)).to(device) for e in options["teachers"]]
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            options[name] = value.to(device)
    if "teacher_logits" in options and exact:
        options["teacher_logits"] = options["teacher_logits"].double()
    loss = fused_distill(z, backend=backend, **options)
    loss.backward(torch.linspace(0.5, 3, loss.numel(), dtype=loss.dtype, device=device).reshape(loss.shape))
    return loss.detach().double().cpu(), z.grad.double().cpu()


def check(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    truth = run(case, "reference", dtype, exact=True)
    eager = run(case, "reference", dtype)
    actual = run(case, backend, dtype, device)
    for name, x, y, e, floor in zip(("loss", "dz"), actual, truth, eager, (1e-3, 1e-2)):
        scale = y.norm().clamp_min(floor * y.numel() ** 0.5)
        error, budget = (x - y).norm() / scale, 2 * (e - y).norm() / scale + BAND[dtype]
        assert error <= budget, f"{name}: error {error:.2e} over the budget {budget:.2e}"


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_emulated_kernel(case, emulated):
    check(case, "cpu", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in TABLE if not case.rounding], ids=str)
def test_emulated_kernel_in_fewer_digits(case, dtype, emulated):
    if case.B < 200:
        check(case, "cpu", dtype)


@pytest.mark.parametrize("B", [17, 257])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_panels_of_13_rows(B, shuffle, emulated, monkeypatch):
    monkeypatch.setattr(panel, "panel_rows", lambda d, *_: min(B, 13))
    for kind in ("logits", "teachers"):
        check(Case(B, {"shuffle": shuffle, "weight": weights(B)}, kind), "cpu", torch.float64)


@pytest.mark.parametrize("B", [5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teacher", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_pair_of_types(dtype, teacher, B):
    """rows() on panels whose rows start anywhere: S and T are slices of wider tensors."""
    z = student(B).to(dtype)
    S = torch.nn.functional.normalize(z, dim=1) @ torch.nn.functional.normalize(z, dim=1).t()
    results = []
    for kernels, kind in ((Emulated, dtype), (eager.Kernels, torch.float64)):
        d = Distillation(z.to(kind), [], [], divergence="kl", seed=5)
        state = panel.State(1.0, torch.empty(B, dtype=d.acc))
        wide_S, wide_T = torch.empty(B, B + 5, dtype=kind), torch.empty(B, B + 3, dtype=teacher)
        s, t = wide_S[3:, 1 : B + 1], wide_T[3:, 2 : B + 2]
        s.copy_(S[3:])
        t.copy_(coarse(B)[3:])
        kernels(d, state).rows(s, t, 3, True)
        results.append((state.loss[3:].double(), s.double()))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=BAND[dtype], atol=BAND[dtype])


def check_long_rows(kernels: type[panel.Kernels], device: str, dtype: torch.dtype, c: int) -> None:
    """Rows whose groups do not fit in shared memory, beside the formulas; a whole batch of them would need minutes on a
    CPU."""
    B, i0 = 12001, 7000
    unit = torch.nn.functional.normalize(student(B), dim=1)
    S = (unit[i0 : i0 + c] @ unit.t()).to(dtype)
    T = torch.randint(-64, 65, (c, B), generator=torch.Generator().manual_seed(1)) / 64
    results = []
    for kind, number, place in ((kernels, dtype, device), (eager.Kernels, torch.float64, "cpu")):
        d = Distillation(unit.to(place, number), [], [], divergence="js", seed=5)
        state = panel.State(1.0, torch.zeros(B, dtype=d.acc, device=place))
        s = S.to(place, number, copy=True)
        kind(d, state).rows(s, T.to(place), i0, True)
        results.append((state.loss[i0 : i0 + c].double().cpu(), s.double().cpu()))
    for x, y in zip(*results):
        assert ((x - y).norm() / y.norm()).item() < BAND[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_long_rows(dtype):
    check_long_rows(Emulated, "cpu", dtype, 2)


def drawn(kernels: Emulated, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row's columns but i by group, and the column that q of each came from, out of the scratch of the last row."""
    B = kernels.d.z1.shape[0]
    column, ends, index = emulation.kernels().row_layout(kernels.problem, kernels.code)
    dtype = torch.uint16 if index == 2 else torch.int32
    arrays = (kernels.scratch[0, at : at + index * (B - 1)].view(dtype).long() for at in (column, ends))
    order, source = arrays
    return order, order[source]


def check_permutation(t: torch.Tensor, i: int, cut: Grouping, seed: int, kernels: Emulated) -> None:
    expected = grouping.shuffled(grouping.groups(t[None].double(), i, cut, 1.0), i, seed)[0]
    kernels.rows(torch.zeros(1, len(t), dtype=torch.float64), t[None], i, False)
    columns, sources = drawn(kernels, i)
    assert torch.equal(columns.sort()[0], torch.arange(len(t))[torch.arange(len(t)) != i])
    assert torch.equal(sources, expected[columns])


def emulated_kernels(B: int, cut: Grouping, seed: int) -> Emulated:
    d = Distillation(student(B, 2), [], [], grouping=cut, seed=seed)
    return Emulated(d, panel.State(1.0, torch.empty(B, dtype=torch.float64)))


@pytest.mark.parametrize("cut", [Grouping("mass", 0.1), Grouping("mass", 0.003), Grouping("mass", 1.0),
                                 Grouping("mass", 1 / 32), Grouping("mass", 1 / 33), Grouping("mass", 1e-6),
                                 Grouping("size", 1.0), Grouping("size", 6.0), Grouping("size", 999.0),
                                 Grouping("span", 3.0, 11), Grouping("span", 0.0, 1)], ids=str)  # fmt: skip
@pytest.mark.parametrize("B", [2, 3, 17, 64, 257])
@pytest.mark.parametrize("steps, seed", [(1, 0), (5, -7), (64, 2**63 - 1)])
def test_permutations_are_those_of_the_definition(cut, B, steps, seed):
    t = coarse(B, seed=B + steps, steps=steps)
    kernels = emulated_kernels(B, cut, seed)
    for i in range(0, B, 1 + B // 20):
        check_permutation(t[i], i, cut, seed, kernels)


@pytest.mark.parametrize("B", [5000, 65537])
@pytest.mark.parametrize("cut", [Grouping("mass", 0.05), Grouping("mass", 0.004), Grouping("size", 2500.0)], ids=str)
@pytest.mark.parametrize("kind", ["ties", "cosines"])
def test_a_long_row(B, cut, kind):
    """Ties fill a bin: the row is sorted. Cosines around 0 beside a near duplicate: a tenth of the bins have all."""
    g = torch.Generator().manual_seed(B)
    t = torch.zeros(B) if kind == "ties" else torch.randint(-400, 400, (B,), generator=g) / 4096
    t[::7] = 0.5 if kind == "ties" else 0.0625
    t[11] = 0.9375
    check_permutation(t, 3, cut, 11, emulated_kernels(B, cut, 11))


@pytest.fixture(params=[(64, False), (96, True)], ids=str)
def thread_block(request):
    """The bodies run by a block of fibers (kernels/cuda/fibers.h): a barrier that is missing shows."""
    emulation.kernels().emulate_with(*request.param)
    yield
    emulation.kernels().emulate_with(0, True)


@pytest.mark.parametrize("cut", [Grouping("mass", 0.1), Grouping("mass", 1.0), Grouping("mass", 0.003),
                                 Grouping("size", 6.0), Grouping("size", 100.0), Grouping("span", 3.0, 11)], ids=str)  # fmt: skip
@pytest.mark.parametrize("B, steps", [(17, 64), (257, 5), (400, 2000)])
def test_permutations_by_a_thread_block(cut, B, steps, thread_block):
    t = coarse(B, seed=B + steps, steps=steps)
    for i in (B // 2, B - 1):
        check_permutation(t[i], i, cut, 7, emulated_kernels(B, cut, 7))


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_a_thread_block(divergence, shuffle, emulated, thread_block):
    for groups in ({"group_p": 0.1}, {"group_size": 2}):
        check(Case(21, {"divergence": divergence, "shuffle": shuffle, **groups}), "cpu", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_signed_zeros_and_infinities_rank_as_numbers(dtype):
    t = torch.tensor([0.0, -0.0, 0.25, -0.25, -torch.inf, 0.0, -0.0, 0.25, -1e-30, 1e-30] * 30, dtype=dtype)
    for cut in (Grouping("size", 7.0), Grouping("size", 100.0)):  # by sorting and by bins
        check_permutation(t, 5, cut, 3, emulated_kernels(len(t), cut, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_and_infinity_give_nan_rows(bad, shuffle, divergence, emulated):
    for B in (2, 9):
        logits, z = coarse(B), student(B).float()
        logits[1, 0] = bad
        loss = fused_distill(
            z, teacher_logits=logits, shuffle=shuffle, divergence=divergence, reduction="none", backend="cpu"
        )
        assert loss.isnan().tolist() == [k == 1 for k in range(B)]
        z[0, 3] = bad
        z.requires_grad_()
        loss = fused_distill(z, teacher_logits=coarse(B), shuffle=shuffle, divergence=divergence, backend="cpu")
        loss.backward()
        assert loss.isnan() and z.grad.isnan().any()


def test_beside_the_contrastive_loss(emulated):
    results = []
    for backend in ("reference", "cpu"):
        z1, z2 = student(40).requires_grad_(), student(40, seed=9).requires_grad_()
        out = fused_distillcse(z1, z2, [student(40, 8, 4)], distill_weight=0.3, seed=3, backend=backend)
        out.loss.backward()
        results.append((*(x.detach() for x in out), z1.grad, z2.grad))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_normalize_writes_strided_rows_times_a_factor():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        z = (student(6, 9) * 3).to(dtype)
        d = Distillation(student(6), [], [])
        wide = torch.full((6, 21), 7.0, dtype=dtype)
        Emulated(d, panel.State(1.0, torch.empty(6, dtype=torch.float64))).normalize(z, None, wide[:, 4:13], 0.5)
        expected = (0.5 * torch.nn.functional.normalize(z.double(), dim=1)).to(dtype)
        torch.testing.assert_close(wide[:, 4:13], expected)
        assert (wide[:, :4] == 7).all() and (wide[:, 13:] == 7).all()


# --- on a GPU ---

on_gpu = pytest.mark.usefixtures("cuda_backend")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*TABLE, Case(1500)], ids=str)
def test_device(case, dtype):
    if dtype == torch.float64 or not case.rounding:
        check(case, "cuda", dtype, "cuda")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_long_rows_on_the_device(dtype):
    check_long_rows(cuda.Kernels, "cuda", dtype, 64)


@on_gpu
@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("B", [700, 3000, 12000])  # groups in shared memory and, the last, in scratch
def test_same_call_same_bits(B, shuffle):
    case = Case(B, {"shuffle": shuffle, "weight": weights(B)}, "teachers")
    for x, y in zip(*(run(case, "cuda", torch.float32, "cuda") for _ in range(2))):
        assert torch.equal(x, y)


@on_gpu
def test_waits_for_nothing_and_is_captured():
    z = torch.randn(300, 64, device="cuda", requires_grad=True)
    teacher, seed = torch.randn(300, 32, device="cuda"), torch.tensor(1, device="cuda")

    def step():
        return torch.autograd.grad(fused_distill(z, [teacher], seed=seed, backend="cuda"), z)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seed.fill_(2)
    graph.replay()
    assert torch.equal(captured, step())
    assert not torch.equal(captured, first)
