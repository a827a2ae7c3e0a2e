"""Losses at several lengths where rows, numbers and calls are unusual, against the sum of separate calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pycse
from pycse.backends.cpu import prefixes
from pycse.panels import prefixes as panels

from oracle import Outcome, held

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FUNCTIONS = {"infonce": pycse.fused_infonce, "focal": pycse.fused_focal_infonce}
DIMS = [8, 32, 16]


@pytest.fixture(params=["small", "panels"])
def way(request, monkeypatch):
    """One native call, and panels of which there are several."""
    if request.param == "panels":
        monkeypatch.setattr(prefixes, "SMALL", {})
        monkeypatch.setattr(panels, "MOST_ROWS", 64)
    return request.param


def embeddings(B: int = 12, N: int | None = None, D: int = 32) -> tuple[Tensor, Tensor]:
    """float64; keys resemble their positives."""
    g = torch.Generator().manual_seed(B + D)
    z1 = torch.randn(B, D, generator=g, dtype=F64)
    z2 = torch.randn(N or B, D, generator=g, dtype=F64)
    z2[: min(B, N or B)] += z1[: min(B, N or B)]
    return z1, z2


@dataclass
class Lengths:
    z1: Tensor
    z2: Tensor
    dims: list[int] = field(default_factory=lambda: DIMS)
    options: dict[str, Any] = field(default_factory=dict)
    loss: str = "focal"
    temperature: Any = 0.05  # where it is a tensor it is trained
    weights: list[float] | None = None
    same: bool = False  # one tensor for rows and keys

    def run(self, backend: str, dtype: torch.dtype, device: str = "cpu", exact: bool = False) -> Outcome:
        """The reference length by length, others in one call."""
        z1, z2 = (z.to(dtype, copy=True).to(F64 if exact else dtype).requires_grad_() for z in (self.z1, self.z2))
        leaves = {"dz1": z1} if self.same else {"dz1": z1, "dz2": z2}
        options, temperature = dict(self.options), self.temperature
        if isinstance(temperature, Tensor):
            temperature = leaves["dtemperature"] = temperature.clone().requires_grad_()
        if "weight" in options:
            options["weight"] = leaves["dweight"] = options["weight"].clone().requires_grad_()
        weights = self.weights or [1.0] * len(self.dims)
        function, keys = FUNCTIONS[self.loss], z1 if self.same else z2
        several = isinstance(temperature, list) or (isinstance(temperature, Tensor) and temperature.dim() == 1)
        if backend == "reference":
            loss = sum(
                w
                * function(
                    z1[:, :d], keys[:, :d], temperature[k] if several else temperature, backend=backend, **options
                )
                for k, (d, w) in enumerate(zip(self.dims, weights))
            )
        else:
            loss = function(z1, keys, temperature, dims=self.dims, dim_weights=self.weights, backend=backend, **options)
        loss.backward(torch.linspace(0.5, 3, loss.numel(), dtype=loss.dtype).reshape(loss.shape))
        return Outcome({"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})


def scaled(rows: float = 1.0, head: float = 1.0, tail: float = 1.0, whole: float = 1.0) -> tuple[Tensor, Tensor]:
    """Row 3 and key 5 by ``rows``, their first 8 features by ``head`` and the rest by ``tail``; all by ``whole``."""
    z1, z2 = embeddings()
    for z, i in ((z1, 3), (z2, 5)):
        z[i] *= rows
        z[i, :8] *= head
        z[i, 8:] *= tail
    return z1 * whole, z2 * whole


def zeros(*parts: tuple[int, slice, slice]) -> tuple[Tensor, Tensor]:
    z = embeddings()
    for which, rows, features in parts:
        z[which][rows, features] = 0
    return z


EVERY, HEAD = slice(None), slice(8)
ROWS = {
    **{f"all by {s:.0e}": scaled(whole=s) for s in (1e-20, 1e-12, 1e-6, 1e12, 1e20)},
    **{f"one row by {s:.0e}": scaled(rows=s) for s in (1e-20, 1e-8, 1e15, 1e20)},
    **{f"first features by {s:.0e}": scaled(head=s) for s in (1e-20, 1e-13, 1e-11, 1e-6, 1e6, 1e14, 1e20)},
    **{f"other features by {s:.0e}": scaled(tail=s) for s in (1e-20, 1e-6, 1e6, 1e11, 1e13, 1e15, 1e20, 1e30)},
    "null by itself": scaled(head=1e-5, whole=1e-9),
    "zero rows": zeros((0, slice(2), EVERY), (1, slice(1, 3), EVERY)),
    "zero first features": zeros((0, slice(2), HEAD), (1, slice(1, 3), HEAD), (1, slice(7, 8), slice(16))),
    "zero first features of all": zeros((0, EVERY, HEAD), (1, EVERY, HEAD)),
    "zero other features": zeros((0, EVERY, slice(8, None))),
    "all zero": zeros((0, EVERY, EVERY), (1, EVERY, EVERY)),
}


@pytest.mark.parametrize("symmetric", [False, True], ids=["rows", "symmetric"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_rows_of_any_size(way, dtype, symmetric):
    failures = []
    for name, (z1, z2) in ROWS.items():
        try:
            held(Lengths(z1, z2, options={"symmetric": symmetric}).run, "cpu", dtype, "cpu")
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)


def several(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


CALLS = [
    Lengths(*embeddings(1)),
    Lengths(*embeddings(1, 5, 8), dims=[3]),
    Lengths(*embeddings(1, 1, 2), dims=[2]),
    Lengths(*embeddings(7, 7, 1), dims=[1], loss="infonce"),
    Lengths(*embeddings(70, 90, 16), dims=[1, 2, 16]),
    Lengths(*embeddings(9, 9, 40), dims=list(range(2, 18))),
    Lengths(*embeddings(9, 9, 40), dims=list(range(2, 19))),
    Lengths(*embeddings(130, 131), dims=[5, 31], weights=[0.0, 2.0]),
    Lengths(*embeddings(), temperature=[0.05, 0.1, 0.2]),
    Lengths(*embeddings(), temperature=several(0.05, 0.1, 0.2), options={"reduction": "none"}),
    Lengths(*embeddings(), temperature=several(0.05, 0.1, 0.2), options={"symmetric": True}),
    Lengths(*embeddings(), temperature=[0.05, 0.1, 0.2], options={"symmetric": True, "reduction": "none"}),
    Lengths(*embeddings(), options={"weight": torch.linspace(0, 1, 12, dtype=F64), "reduction": "none"}),
    Lengths(*embeddings(), options={"weight": torch.linspace(0, 1, 12, dtype=F64)}, weights=[1.0, 0.0, 0.5]),
    Lengths(*embeddings(), same=True, loss="infonce"),
    Lengths(*embeddings(), same=True, options={"symmetric": True}),
    Lengths(*embeddings(), options={"exclude_above": 0.05}),
    Lengths(*embeddings(), options={"exclude_above": torch.linspace(0, 0.2, 12, dtype=F64), "exclude_by": "relative"}),
    Lengths(*embeddings(), options={"guides": [(embeddings(D=5)[0], embeddings(D=5)[1])], "guide_above": -0.1}),
    Lengths(*embeddings(), options={"guide_logits": embeddings(12, 12, 12)[0]}),
    Lengths(*embeddings(6, 12), options={"negatives": (torch.arange(7), torch.arange(6, 12))}, loss="infonce"),
    Lengths(*embeddings(6, 12), options={"directions": ["qd", "qq", "dq", "dd"]}, loss="infonce"),
    Lengths(*embeddings(6, 18), options={"hard_negative_weight": 0.5}),
    Lengths(*embeddings(), options={"hardness": 3.0}),
    Lengths(*(z / 6 for z in embeddings()), options={"normalize": False}),
    Lengths(*(z / 6 for z in embeddings()), options={"normalize": False, "symmetric": True}, dims=[1, 32]),
]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64, F16], ids=str)
def test_unusual_calls(way, dtype, backend):
    if (backend == "torch") == (way == "small"):
        failures = []
        for k, case in enumerate(CALLS):
            try:
                held(case.run, backend, dtype, "cpu")
            except AssertionError as error:
                failures.append(f"{k}, {case.dims} {list(case.options)}: {error}")
        assert not failures, "\n".join(failures)


def lengths(z1: Tensor, z2: Tensor, **options: Any) -> Tensor:
    return pycse.fused_infonce(z1, z2, dims=DIMS, **options)


def gradients(z1: Tensor, z2: Tensor, loss: Any = lengths) -> list[Tensor]:
    z1, z2 = (z.detach().requires_grad_() for z in (z1, z2))
    value = loss(z1, z2)
    value.backward(torch.ones_like(value))
    return [value.detach(), z1.grad, z2.grad]


def transposed(z: Tensor) -> Tensor:
    return z.t().contiguous().t()


def in_wider(z: Tensor) -> Tensor:
    return torch.cat([z, z], 1)[:, : z.shape[1]]


def every_other(z: Tensor) -> Tensor:
    return z.repeat_interleave(2, 1)[:, ::2]


SEVERAL_WAYS = {
    "transposed": lambda z1, z2: lengths(transposed(z1), transposed(z2)),
    "in wider rows": lambda z1, z2: lengths(in_wider(z1), in_wider(z2)),
    "every other": lambda z1, z2: lengths(every_other(z1), every_other(z2)),
    "negative view": lambda z1, z2: lengths(torch._neg_view(-z1), z2),
    "checkpoint": lambda z1, z2: checkpoint(lengths, z1 * 1, z2 * 1, use_reentrant=False),
    "reentrant": lambda z1, z2: checkpoint(lengths, z1 * 1, z2 * 1, use_reentrant=True),
    "vmap": lambda z1, z2: torch.vmap(lengths)(z1[None], z2[None])[0],
    "rows": lambda z1, z2: lengths(z1, z2, reduction="none").mean(),
    "with parts": lambda z1, z2: lengths(z1, z2, parts=True).loss,
    "func.grad": lambda z1, z2: _Given.apply(z1, z2),
}


class _Given(torch.autograd.Function):
    """The loss with the gradients that torch.func makes of it."""

    @staticmethod
    def forward(ctx: Any, *z: Tensor) -> Tensor:
        gradients, loss = torch.func.grad_and_value(lengths, argnums=(0, 1))(*(x.detach() for x in z))
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return tuple(upstream * g for g in ctx.saved_tensors)


def test_one_result_in_several_ways(way):
    z = [x.float() for x in embeddings()]
    expected = gradients(*z)
    for name, loss in SEVERAL_WAYS.items():
        for a, b in zip(gradients(*z, loss), expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.clean_memory
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction):
    temperatures = torch.tensor([0.05, 0.1, 0.2])
    whole = lambda z1, z2: lengths(z1, z2, temperature=temperatures, dim_weights=[1.0, 0.5, 2.0], reduction=reduction)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True, dynamic=True)
    for B in (12, 7):
        z = [x.float() for x in embeddings(B)]
        for a, b in zip(gradients(*z, compiled), gradients(*z, whole)):
            torch.testing.assert_close(a, b)


def test_backward_twice(way):
    z1, z2 = (z.float().requires_grad_() for z in embeddings())
    loss = lengths(z1, z2)
    (first,) = torch.autograd.grad(loss, z1, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss, z1, torch.tensor(2.0), create_graph=True)
    torch.testing.assert_close(second.detach(), 2 * first)
    with pytest.raises(RuntimeError, match="second"):
        second.sum().backward()
    with torch.no_grad():
        assert not lengths(z1, z2).requires_grad


def test_autocast(way):
    z = [x.float() for x in embeddings()]
    with torch.autocast("cpu", BF16):
        result = gradients(*z)
    for a, b in zip(result, gradients(*(x.bfloat16() for x in z))):
        torch.testing.assert_close(a, b.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which, feature", [(0, 0), (0, 12), (0, 31), (1, 0), (1, 12), (1, 31)])
def test_bad_numbers_show(way, bad, which, feature):
    """Where they are NaN in the sum of separate calls, and nowhere else."""
    z = [x.float() for x in embeddings()]
    z[which][3, feature] = bad
    rows = lambda z1, z2: lengths(z1, z2, reduction="none")  # noqa: E731
    apart = lambda z1, z2: sum(pycse.fused_infonce(z1[:, :d], z2[:, :d], reduction="none") for d in DIMS)  # noqa: E731
    for a, b in zip(gradients(*z, rows), gradients(*z, apart)):
        assert torch.equal(a.isnan(), b.isnan())


def test_threads_and_repetitions(way):
    z = [x.float() for x in embeddings(90, 110)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(gradients(*z))
    finally:
        torch.set_num_threads(threads)
    for one, two, again in zip(*results):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        assert torch.equal(two, again)
