"""Rows, keys and a teacher's cosines for AdapACSE, the table of cases that every backend is held to, and how far one may
be off."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pycse import fused_adapacse
from pycse.backends.reference.contrastive import normalized

from oracle import Case, Outcome, held

# How far a panel's rounding moves a similarity. At theta = m the loss jumps: no pair may be that near (Angles.margin).
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 4e-3}


@dataclass
class Angles:
    B: int = 20
    N: int | None = None
    D: int = 32
    temperature: float = 0.05
    m: float = 0.3
    trained: bool = False  # the temperature a tensor that requires grad
    kind: str = "random"
    widths: tuple[int, ...] = (9,)  # of the guides; none: logits
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.B}x{self.N or self.B}x{self.D}", f"tau{self.temperature:g}", f"m{self.m:.3g}"]
        parts += [self.kind] * (self.kind != "random") + ["trained"] * self.trained
        parts.append("guides" + "+".join(map(str, self.widths)) if self.widths else "logits")
        return "-".join(parts + [k if isinstance(v, (Tensor, list)) else f"{k}={v}" for k, v in self.options.items()])

    def embeddings(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        kind = "random" if self.kind == "mirrored" else self.kind
        z1, z2 = Case(self.B, self.N, self.D, kind=kind, seed=self.seed).embeddings(dtype)
        if self.kind == "mirrored":  # negatives at both ends: keys that are rows, or opposite to them
            z2[self.B : 2 * self.B], z2[2 * self.B : 3 * self.B] = z1, -3 * z1
        return z1.to(dtype), z2.to(dtype)

    def teacher(self) -> dict[str, Any]:
        """In float64. Logits reach beyond [-1, 1], guides agree with the positives."""
        g = torch.Generator().manual_seed(self.seed + 7)
        B, N = self.B, self.N or self.B
        if not self.widths:
            return {"guide_logits": torch.randn(B, N, generator=g, dtype=torch.float64) * 0.7}
        pairs = []
        for width in self.widths:
            q, k = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (B, N))
            k[: min(B, N)] += q[: min(B, N)]
            pairs.append((q, k))
        return {"guides": pairs}

    def margin(self, dtype: torch.dtype) -> float:
        """m, or the margin next to it whose cosine no pair comes near."""
        z1, z2 = (normalized(z.double()) for z in self.embeddings(dtype))
        s = (z1 @ z2.t()).flatten().sort().values
        s = torch.cat([s.new_tensor([-0.1]), s[s > 0], s.new_tensor([1 + 8 * ROUNDING[dtype]])])
        low, high = s[:-1] + ROUNDING[dtype], s[1:] - ROUNDING[dtype]
        c = math.cos(self.m)
        if self.m == 0 or bool(((low < c) & (c < high)).any()):
            return self.m
        wide = (low < high) & (high > 0) & (low < 1)
        middle = ((low + high) / 2)[wide].clamp(0, 1)
        return math.acos(middle[(middle - c).abs().argmin()].item())


def ids(B: int, N: int, groups: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(B + N)
    q, k = (torch.randint(0, groups, (n,), generator=g) for n in (B, N))
    return {"query_ids": q * 10**9 - 7, "key_ids": k * 10**9 - 7}


def weights(B: int) -> Tensor:
    return torch.linspace(0, 2, B, dtype=torch.float64)


SHAPES = [
    *(
        Angles(B, N, D)
        for B, N, D in ((1, None, 5), (1, 3, 2), (2, None, 7), (15, None, 33), (16, 17, 16), (17, 31, 97))
    ),
    *(Angles(B, N, D) for B, N, D in ((64, None, 40), (33, 255, 8), (33, 256, 8), (33, 257, 8))),
    Angles(101, 531, 40, trained=True, widths=(9, 20)),
]
LOGITS = [
    *(Angles(20, 40, temperature=temperature, m=m, trained=trained)
      for temperature, m in ((0.05, 0.0), (1.0, 0.1), (0.05, 1.2), (0.2, math.pi / 2), (0.01, 0.3), (0.001, 1.0))
      for trained in (False, True)),
    Angles(20, 47, widths=()),
    Angles(20, 40, m=1.4, widths=(), trained=True),
    Angles(20, 40, m=1.2, options={"guide_weights": [1, 3]}, widths=(5, 12)),
]  # fmt: skip
POSITIVES = [
    Angles(20, 47, m=1.0, options={"positives": torch.arange(20) * 2 + 3}),
    Angles(20, 5, m=1.3, options={"positives": torch.arange(20) % 5}, trained=True),
    Angles(20, 50, options={"positives": torch.arange(20, dtype=torch.int32) + 30}),
    *(Angles(B, N, 24, m=1.2, options=ids(B, N, groups), trained=trained)
      for B, N, groups, trained in ((20, 20, 5, False), (40, 90, 6, True), (30, 600, 20, True))),
    Angles(9, 33, options={"query_ids": torch.zeros(9).long(), "key_ids": torch.zeros(33).long()}),  # no negatives
]  # fmt: skip
HOSTILE = [
    *(Angles(20, 33, m=m, kind=kind)
      for kind in ("duplicates", "equal", "zeros", "scales", "far", "opposite", "confident")
      for m in (0.1, 1.5)),
    Angles(20, 65, m=1.0, kind="mirrored"),
    Angles(20, 65, m=0.3, temperature=0.02, kind="mirrored", trained=True),
    Angles(33, 300, 24, m=1.0, temperature=0.005, kind="opposite", options=ids(33, 300, 9)),
]  # fmt: skip
OPTIONS = [
    Angles(33, 50, m=1.1, options={"reduction": reduction, **weight, **more}, trained=bool(more))
    for reduction in ("mean", "sum", "none")
    for weight in ({}, {"weight": weights(33)})
    for more in ({}, ids(33, 50, 7))
]
ALL = [*SHAPES, *LOGITS, *POSITIVES, *HOSTILE, *OPTIONS]


def run(case: Angles, backend: str, dtype: torch.dtype, device: str = "cpu", exact: bool = False) -> Outcome:
    """Loss and all gradients for an upstream gradient that is not 1. ``exact`` promotes the dtype's values to
    float64."""

    def placed(t: Tensor) -> Tensor:
        t = t.to(dtype)
        return (t.double() if exact else t).detach().clone().to(device)

    z1, z2 = (placed(z).requires_grad_() for z in case.embeddings(dtype))
    leaves = {"dz1": z1, "dz2": z2}
    options = {name: v.clone().to(device) if isinstance(v, Tensor) else v for name, v in case.options.items()}
    for name, value in case.teacher().items():
        options[name] = placed(value) if isinstance(value, Tensor) else [(placed(q), placed(k)) for q, k in value]
    temperature: Any = case.temperature
    if case.trained:
        temperature = torch.tensor(temperature, dtype=torch.float64, device=device, requires_grad=True)
        leaves["dtemperature"] = temperature
    if "weight" in options:
        leaves["dweight"] = options["weight"] = options["weight"].requires_grad_()
    loss = fused_adapacse(z1, z2, temperature, case.margin(dtype), backend=backend, **options)
    upstream = torch.linspace(0.5, 3, loss.numel(), dtype=loss.dtype, device=device).reshape(loss.shape)
    loss.backward(upstream)
    return Outcome({"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})


def check(case: Angles, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Twice the error of the formula in PyTorch at this dtype, and a band."""
    call = lambda *given, **more: run(case, *given, **more)  # noqa: E731
    held(call, backend, dtype, device, lambda name: max(1, 0.05 / case.temperature))
