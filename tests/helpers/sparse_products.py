"""The products of sparse linear layers for backends of a GPU: one table of cases, held to the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cuda_graphs import capture, never_waits
from torch import Tensor

from pycse.backends.reference import sparse as reference
from pycse.pattern import Pattern, pack_mask
from pycse.sparse import SparseLinear, masked_linear

from oracle import BAND

Products = Callable[..., Tensor]


@dataclass
class Case:
    """``block`` 0 is a mask of bits; weights outside the mask are NaN, which nothing may let through."""

    T: int
    out: int
    in_: int
    block: int
    density: float | str = 0.4  # or "one": a single block
    strided: bool = False  # rows that begin anywhere
    bias: bool = True

    def __str__(self) -> str:
        kind = f"block{self.block}" if self.block else "bits"
        return f"{self.T}x{self.out}x{self.in_}-{kind}-{self.density}{'-strided' * self.strided}{'' if self.bias else '-plain'}"

    def mask(self) -> Tensor:
        g = torch.Generator().manual_seed(self.T + self.out + self.in_)
        side = max(1, self.block)
        kept = torch.zeros(self.out // side, self.in_ // side, dtype=torch.bool)
        if self.density == "one":
            kept.view(-1)[-1:] = True
        else:
            kept = torch.rand(kept.shape, generator=g) < self.density
            if self.density > 0 and kept.shape[0] > 2:
                kept[1] = False  # a block row, and in dX a block column, of nothing
        return kept.repeat_interleave(side, 0).repeat_interleave(side, 1)

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x, weight, dy, bias"""
        g = torch.Generator().manual_seed(1)

        def tensor(rows: int, columns: int) -> Tensor:
            t = torch.randn(rows, columns + 7, generator=g, dtype=torch.float64).to(device=device, dtype=dtype)
            return t[:, 3 : 3 + columns] if self.strided else t[:, :columns].contiguous()

        x, weight, dy = tensor(self.T, self.in_), tensor(self.out, self.in_), tensor(self.T, self.out)
        weight.masked_fill_(~self.mask().to(device), torch.nan)
        return x, weight, dy, tensor(1, self.out)[0] if self.bias else None


def run(case: Case, module: Any, dtype: torch.dtype, device: str, exact: bool = False) -> dict[str, Tensor]:
    """Each product of a backend. ``exact`` promotes the dtype's values to float64."""
    x, weight, dy, bias = (
        t if t is None or not exact else t.double() for t in case.inputs(dtype, device)
    )  # fmt: skip
    mask = case.mask().to(device)
    if case.block == 0:
        bits = pack_mask(mask)
        return {
            "y": module.masked(x, weight, bits, bias),
            "dx": module.masked_dx(dy, weight, bits),
            "dw": module.masked_dw(dy, x, bits),
        }
    pattern = Pattern.from_mask(mask, case.block)
    return {
        "y": module.linear(x, weight, bias, pattern),
        "dx": module.dx(dy, weight, pattern),
        "dw": module.dw(dy, x, pattern),
    }


def check(case: Case, module: Any, dtype: torch.dtype, device: str) -> None:
    truth = run(case, reference, dtype, "cpu", exact=True)
    eager = run(case, reference, dtype, "cpu")
    actual = run(case, module, dtype, device)
    mask = case.mask()
    for name, value in truth.items():
        result = actual[name]
        assert result.shape == value.shape and result.dtype == dtype, name
        size = value.norm().clamp_min(1e-30)
        error = ((result.double().cpu() - value).norm() / size).item()
        budget = 2 * ((eager[name].double() - value).norm() / size).item() + BAND[dtype] / 4
        assert error <= budget, f"{name}: error {error:.2e} over the budget {budget:.2e}"
    assert not actual["dw"].cpu()[~mask].any()


# Tokens beside a tile's edge (64 and 128) and none; block rows of nothing, of one block, of everything.
BLOCKS = [
    *(Case(T, 3 * block, 4 * block, block) for block in (16, 32, 64) for T in (1, 65)),
    *(Case(17, 128, 192, block, density) for block in (16, 32, 64) for density in (0.0, "one", 1.0)),
    Case(127, 64, 64, 16),
    Case(128, 64, 64, 16, bias=False),
    Case(129, 64, 96, 32),
    Case(131, 192, 448, 64, 0.3, strided=True),
    Case(40, 96, 160, 32, 0.6, strided=True, bias=False),
    Case(33, 48, 176, 16, 0.7, strided=True),
    Case(0, 64, 64, 32),
    Case(1, 64, 64, 64, 1.0),
    Case(30, 16, 1040, 16, 0.9),
]
BITS = [
    Case(1, 1, 1, 0, 1.0),
    Case(5, 64, 64, 0),
    Case(3, 65, 33, 0, 0.5),
    Case(7, 31, 129, 0),
    Case(66, 37, 75, 0, 0.1, strided=True),
    Case(129, 80, 136, 0, 0.5, bias=False),
    Case(9, 40, 72, 0, 0.0),
    Case(9, 40, 72, 0, "one"),
    Case(9, 40, 72, 0, 1.0),
    Case(0, 40, 72, 0),
    Case(11, 129, 200, 0, 0.3),
]
SINGLE = [
    Case(1, 1, 1, 1, 1.0),
    Case(7, 37, 75, 1, 0.1),
    Case(65, 66, 130, 1, 0.05, strided=True),
    Case(9, 40, 72, 1, 0.0),
    Case(9, 40, 72, 1, "one"),
]
ALL = [*BLOCKS, *BITS, *SINGLE]
# With tokens split among programs where the backend is told to: a last split that is short, and ones that are empty.
SPLIT = [Case(200, 128, 128, 32, 0.5), Case(97, 64, 128, 64), Case(150, 48, 80, 16, strided=True), Case(70, 70, 90, 0)]


def check_layer(backend: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    """SparseLinear and masked_linear, forward and backward, beside the reference backend; leading dimensions as they
    come."""
    g = torch.Generator().manual_seed(2)
    for block, pattern in ((32, "block32"), (16, "block16"), (1, "unstructured"), (1, "masked")):
        mask = (torch.rand(96 // block, 64 // block, generator=g) < 0.5).repeat_interleave(block, 0)
        mask = mask.repeat_interleave(block, 1).to(device)
        dense = torch.nn.Linear(64, 96, device=device, dtype=dtype)
        x = torch.randn(2, 9, 64, generator=g, dtype=torch.float64).to(device=device, dtype=dtype)
        results = []
        for name in ("reference", backend):
            given = x.clone().requires_grad_()
            if pattern == "masked":
                weight = dense.weight.detach().clone().requires_grad_()
                y = masked_linear(given, weight, mask, dense.bias, backend=name)
            else:
                layer = SparseLinear.from_dense(dense, mask, pattern, name)
                weight, y = layer.weight, layer(given)
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype, device=device).view(y.shape))
            results.append((y.detach(), given.grad, weight.grad))
        for expected, actual in zip(*results):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- on a GPU ---

LARGE = [
    Case(8192, 3072, 768, 64, 0.25),
    Case(2047, 768, 3072, 32, 0.1),
    Case(5000, 768, 768, 16, 0.5),
    Case(1000, 1000, 777, 0, 0.5),
    Case(515, 768, 768, 1, 0.1),
]


def check_repeat(case: Case, backend: Any) -> None:
    """The same call gives the same bits."""
    first, second = (run(case, backend, torch.bfloat16, "cuda") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def check_capture(case: Case, backend: Any) -> None:
    """The products wait for nothing, and a CUDA graph replays them."""
    x, weight, dy, bias = case.inputs(torch.bfloat16, "cuda")
    mask = case.mask().cuda()
    kept = Pattern.from_mask(mask, case.block) if case.block else pack_mask(mask)

    def step():
        if case.block:
            return backend.linear(x, weight, bias, kept), backend.dx(dy, weight, kept), backend.dw(dy, x, kept)
        return (
            backend.masked(x, weight, kept, bias),
            backend.masked_dx(dy, weight, kept),
            backend.masked_dw(dy, x, kept),
        )

    never_waits(step)
    replay = capture(step)
    x.normal_()
    for a, b in zip(replay(), step()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
