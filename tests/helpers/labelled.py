"""Rows with classes: the table of cases that every backend of the supervised contrastive loss is held to, as oracle.py
and cases.py are of the contrastive losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pycse import fused_supcon

from oracle import Case, Outcome, held


@dataclass
class Labelled:
    """Embeddings of a Case with ids: the keys are z2, or without N the rows themselves."""

    B: int = 20
    N: int | None = None
    D: int = 32
    ids: str = "classes"
    kind: str = "random"
    temperature: float = 0.05
    trained: bool = False  # the temperature a tensor that requires grad
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.B}x{self.N or 'same'}x{self.D}", self.ids, f"tau{self.temperature}"]
        parts += [self.kind] * (self.kind != "random") + ["trained"] * self.trained
        return "-".join(parts + [k if isinstance(v, Tensor) else f"{k}={v}" for k, v in self.options.items()])

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """z1, ids1, z2, ids2 in float64; a row's positives resemble it."""
        B, N = self.B, self.N or self.B
        z1, z2 = Case(B, N, self.D, kind=self.kind, seed=self.seed).embeddings(dtype)
        g = torch.Generator().manual_seed(self.seed)
        if self.ids == "classes":  # of 1 to many members, some of them of rows or of keys alone; any numbers
            ids1, ids2 = (torch.randint(0, max(2, B // 3), (n,), generator=g) for n in (B, N))
            ids1, ids2 = ids1**2 * 10**9 - 7, ids2**2 * 10**9 - 7
        elif self.ids == "pairs":
            ids1, ids2 = torch.arange(B) // 2, torch.arange(N) % B
        elif self.ids == "all equal":
            ids1, ids2 = torch.full((B,), 3), torch.full((N,), 3)
        elif self.ids == "all different":
            ids1, ids2 = torch.arange(B), torch.arange(N)
        else:
            assert self.ids == "none"
            ids1, ids2 = torch.arange(B), torch.arange(N) + B
        if self.N is not None:
            return z1, ids1, z2, ids2
        if self.kind == "random":
            z1 = z1 + torch.randn(int(ids1.max() % 1009) + 1009, self.D, generator=g, dtype=z1.dtype)[ids1 % 1009]
        return z1, ids1, None, None


WEIGHTS = torch.linspace(0, 2, 20, dtype=torch.float64)
SHAPES = [
    Labelled(1, None, 5),
    Labelled(1, 1, 5, "all equal"),
    Labelled(1, 3, 2, "all equal"),
    Labelled(2, None, 7, "all equal"),
    Labelled(15, None, 33),
    Labelled(16, 17, 16),
    Labelled(17, 31, 97),
    Labelled(64, None, 40),
    Labelled(65, 63, 24),
    Labelled(101, 331, 40, trained=True),
    Labelled(257, None, 31, "pairs"),
    Labelled(300, None, 16),
    Labelled(90, 513, 48, "all equal"),
]
LOGITS = [
    Labelled(temperature=0.01),
    Labelled(20, 40, temperature=0.01),
    Labelled(temperature=1.0),
    Labelled(33, 70, temperature=0.01, trained=True),
    Labelled(33, trained=True),
    Labelled(33, ids="pairs", trained=True),
    Labelled(20, 40, 16, kind="opposite", temperature=0.005, ids="all different"),  # positives below what exp can say
]
IDS = [
    *(Labelled(20, N, ids=ids) for N in (None, 47) for ids in ("pairs", "all equal", "all different", "none")),
    Labelled(20, ids="all different", trained=True),  # no row has a positive
]
HOSTILE = [
    *(Labelled(20, 40, ids=ids, kind="confident") for ids in ("all different", "pairs")),
    *(
        Labelled(20, N, ids="pairs", kind=kind)
        for N in (None, 33)
        for kind in ("duplicates", "equal", "zeros", "scales", "far", "opposite")
    ),
    Labelled(20, 33, kind="opposite", temperature=0.01, trained=True),
]
OPTIONS = [
    Labelled(kind="unit", options={"normalize": False}),
    Labelled(20, 30, kind="unit", options={"normalize": False}, trained=True),
    Labelled(D=8, options={"normalize": False}, temperature=1.0),  # dot products far outside [-1, 1]
    *(
        Labelled(20, N, options={"reduction": reduction, **weight}, trained=N is None)
        for N in (None, 30)
        for reduction in ("mean", "sum", "none")
        for weight in ({}, {"weight": WEIGHTS})
    ),
]
ALL = [*SHAPES, *LOGITS, *IDS, *HOSTILE, *OPTIONS]


def run(
    case: Labelled, inside: bool, backend: str, dtype: torch.dtype, device: str = "cpu", exact: bool = False
) -> Outcome:
    """Loss and all gradients for an upstream gradient that is not 1. ``exact`` promotes the dtype's values."""
    z1, ids1, z2, ids2 = case.tensors(dtype)
    options = dict(case.options)
    leaves = {}
    for name, z in (("dz1", z1), ("dz2", z2)):
        if z is not None:
            z = z.to(dtype)
            leaves[name] = (z.double() if exact else z).detach().clone().to(device).requires_grad_()
    ids1, ids2 = (None if t is None else t.to(device) for t in (ids1, ids2))
    tau: Any = case.temperature
    if case.trained:
        tau = leaves["dtemperature"] = torch.tensor(tau, dtype=torch.float64, device=device, requires_grad=True)
    if "weight" in options:
        options["weight"] = leaves["dweight"] = options["weight"].clone().to(device).requires_grad_()
    loss = fused_supcon(leaves["dz1"], ids1, leaves.get("dz2"), ids2, tau, inside=inside, backend=backend, **options)
    loss.backward(torch.linspace(0.5, 3, loss.numel(), dtype=loss.dtype, device=device).reshape(loss.shape))
    return Outcome({"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})


def check(case: Labelled, inside: bool, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """As oracle.check."""
    held(lambda *given, **more: run(case, inside, *given, **more), backend, dtype, device)


def check_all(backend: str, *dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        for inside in (False, True):
            for case in ALL:
                check(case, inside, backend, dtype)
