"""Pairs of embeddings for the sigmoid loss, the table of cases that every backend is held to, and how far one may be off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pycse import fused_sigmoid

from oracle import Case, Outcome, held


@dataclass
class Pairs:
    B: int = 20
    N: int | None = None
    D: int = 32
    scale: float = 10.0
    bias: float = -10.0
    trained: bool = False  # scale and bias as tensors that require grad
    kind: str = "random"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.B}x{self.N or self.B}x{self.D}", f"{self.scale:g}", f"{self.bias:g}"]
        parts += [self.kind] * (self.kind != "random") + ["trained"] * self.trained
        return "-".join(parts + [k if isinstance(v, Tensor) else f"{k}={v}" for k, v in self.options.items()])

    def embeddings(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return Case(self.B, self.N, self.D, kind=self.kind, seed=self.seed).embeddings(dtype)


def ids(B: int, N: int, groups: int) -> dict[str, Tensor]:
    """Some rows have no positive, others many; any numbers."""
    g = torch.Generator().manual_seed(B + N)
    q, k = (torch.randint(0, most, (n,), generator=g) for n, most in ((B, groups + 2), (N, groups)))
    return {"query_ids": q**2 * 10**9 - 7, "key_ids": k**2 * 10**9 - 7}


def weights(B: int) -> Tensor:
    return torch.linspace(0, 2, B, dtype=torch.float64)


SHAPES = [
    *(
        Pairs(B, N, D)
        for B, N, D in ((1, None, 5), (1, 3, 2), (2, None, 7), (15, None, 33), (16, 17, 16), (17, 31, 97))
    ),
    *(Pairs(B, N, D) for B, N, D in ((64, None, 40), (63, 65, 24), (33, 255, 8), (33, 256, 8), (33, 257, 8))),
    Pairs(101, 531, 40, trained=True),
]
LOGITS = [
    *(Pairs(20, 40, scale=scale, bias=bias, trained=trained)
      for scale, bias in ((1.0, 0.0), (10.0, 5.0), (200.0, -10.0), (200.0, -150.0), (0.01, -3.0), (10.0, -100.0))
      for trained in (False, True)),
    Pairs(20, 40, scale=200.0, kind="opposite"),
    Pairs(20, 40, scale=200.0, kind="confident"),
    Pairs(20, 40, scale=2000.0, bias=0.0, kind="opposite"),  # exp leaves float32's range on both sides
]  # fmt: skip
POSITIVES = [
    Pairs(20, 47, options={"positives": torch.arange(20) * 2 + 3}),
    Pairs(20, 5, options={"positives": torch.arange(20) % 5}, trained=True),
    Pairs(20, 50, options={"positives": torch.arange(20, dtype=torch.int32) + 30}),
    *(Pairs(B, N, 24, options=ids(B, N, groups), trained=trained)
      for B, N, groups, trained in ((20, 20, 5, False), (40, 90, 6, True), (20, 7, 3, False), (30, 600, 20, True))),
    Pairs(9, 33, options={"query_ids": torch.zeros(9).long(), "key_ids": torch.zeros(33).long()}),  # all positive
    Pairs(9, 33, options={"query_ids": torch.zeros(9).long(), "key_ids": torch.ones(33).long()}, trained=True),  # none
    Pairs(33, 300, scale=200.0, bias=-3.0, kind="opposite", options=ids(33, 300, 9)),
]  # fmt: skip
HOSTILE = [
    *(Pairs(20, 33, kind=kind, options=options)
      for kind in ("duplicates", "equal", "zeros", "scales", "far", "opposite", "confident")
      for options in ({}, ids(20, 33, 6))),
]  # fmt: skip
OPTIONS = [
    Pairs(kind="unit", options={"normalize": False}, trained=True),
    Pairs(20, 30, kind="unit", options={"normalize": False, **ids(20, 30, 5)}),
    Pairs(D=8, options={"normalize": False}, scale=1.0),  # dot products far outside [-1, 1]
    *(Pairs(33, 50, options={"reduction": reduction, **weight, **more}, trained=bool(more))
      for reduction in ("mean", "sum", "none")
      for weight in ({}, {"weight": weights(33)})
      for more in ({}, ids(33, 50, 7))),
]  # fmt: skip
ALL = [*SHAPES, *LOGITS, *POSITIVES, *HOSTILE, *OPTIONS]


def run(case: Pairs, backend: str, dtype: torch.dtype, device: str = "cpu", exact: bool = False) -> Outcome:
    """Loss and all gradients for an upstream gradient that is not 1. ``exact`` promotes the dtype's values to
    float64."""
    z1, z2 = (z.to(dtype) for z in case.embeddings(dtype))
    if exact:
        z1, z2 = z1.double(), z2.double()
    z1, z2 = (z.detach().clone().to(device).requires_grad_() for z in (z1, z2))
    leaves = {"dz1": z1, "dz2": z2}
    options = {name: v.clone().to(device) if isinstance(v, Tensor) else v for name, v in case.options.items()}
    scale: Any = case.scale
    bias: Any = case.bias
    if case.trained:
        scale, bias = (torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True) for x in (scale, bias))
        leaves |= {"dscale": scale, "dbias": bias}
    if "weight" in options:
        leaves["dweight"] = options["weight"] = options["weight"].requires_grad_()
    loss = fused_sigmoid(z1, z2, scale, bias, backend=backend, **options)
    upstream = torch.linspace(0.5, 3, loss.numel(), dtype=loss.dtype, device=device).reshape(loss.shape)
    loss.backward(upstream)
    return Outcome({"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})


def check(case: Pairs, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Twice the error of the formula in PyTorch at this dtype, and a band: of a gradient that cancels, of what
    cancelled."""
    call = lambda *given, **more: run(case, *given, **more)  # noqa: E731
    held(call, backend, dtype, device, lambda name: 1 if name == "loss" else max(1, case.scale / 10))
