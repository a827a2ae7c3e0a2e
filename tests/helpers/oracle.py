"""The one place that says what is right: results of backend="reference" in float64, and how far a kernel may be off.

A kernel's budget is 2 x the error of the same maths in plain PyTorch at the kernel's dtype, plus a rounding band.
Errors are norm-wise: |x - ref| / |ref|.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pycse import fused_focal_infonce, fused_infonce

# Rounding of inputs' products and of the stored result. A bf16 panel rounds s by 2^-9, and l' = (2 s + m)/tau = 46
# makes that
# 0.09 in a logit: with one negative (B = 2) nothing averages it.
BAND = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 1.5e-3}
# Below this size a value is judged absolutely. Gradients that vanish only after the projection (all rows equal, D = 1)
# leave the rounding of what cancelled, about l' eps = 40 eps; test_confident_rows looks at small gradients that do not
# cancel.
FLOOR_LOSS, FLOOR_GRADIENT = 1e-8, 0.1


@dataclass
class Case:
    B: int = 16
    N: int | None = None
    D: int = 32
    options: dict[str, Any] = field(default_factory=dict)
    focal: bool = True
    temperature: float = 0.05
    m: float = 0.3
    tensors: bool = False  # temperature and m as tensors that require grad
    kind: str = "random"  # what the embeddings look like
    seed: int = 0

    def __str__(self) -> str:
        parts = [
            f"{self.B}x{self.N or self.B}x{self.D}",
            "focal" if self.focal else "infonce",
            f"tau{self.temperature}",
        ]
        parts += [self.kind] if self.kind != "random" else []
        parts += ["tensors"] if self.tensors else []
        parts += [f"m{self.m}"] if self.m != 0.3 else []
        for name, value in self.options.items():
            parts.append(name if isinstance(value, (Tensor, list, tuple)) else f"{name}={value}")
        return "-".join(parts)

    def embeddings(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """float64; keys resemble their positives, as in training."""
        g = torch.Generator().manual_seed(self.seed)
        B, N, D = self.B, self.N or self.B, self.D
        z1 = torch.randn(B, D, generator=g, dtype=torch.float64)
        z2 = torch.randn(N, D, generator=g, dtype=torch.float64)
        z2[: min(B, N)] += z1[: min(B, N)]
        if self.kind == "confident":  # p -> 1: positives almost equal, negatives almost orthogonal
            z2[: min(B, N)] = z1[: min(B, N)] + 1e-3 * z2[: min(B, N)]
        elif self.kind == "duplicates":
            z2[1::2] = z2[: N - 1 : 2][: len(z2[1::2])]
            z1[1::2] = z1[: B - 1 : 2][: len(z1[1::2])]
        elif self.kind == "equal":  # all rows the same
            z1[:], z2[:] = z1[0], z1[0]
        elif self.kind == "zeros":
            z1[0], z2[-1], z2[0] = 0, 0, 0
        elif self.kind == "scales":  # norms over many orders of magnitude
            most = 2 if dtype == torch.float16 else 8
            z1 *= 10 ** torch.linspace(-most, most, B, dtype=torch.float64)[:, None]
            z2 *= 10 ** torch.linspace(most, -most, N, dtype=torch.float64)[:, None]
        elif self.kind == "far":  # one row and one key whose squares leave the type's range
            most = {torch.float16: 1e2, torch.float64: 1e160}.get(dtype, 1e25)
            z1[B // 2] *= most
            z2[N // 3] *= most
        elif self.kind == "unit":  # what normalize=False expects
            z1, z2 = z1 / z1.norm(dim=1, keepdim=True), z2 / z2.norm(dim=1, keepdim=True)
        elif self.kind == "opposite":  # the positive is the worst key
            z2[: min(B, N)] = -z1[: min(B, N)]
        return z1, z2


@dataclass
class Outcome:
    values: dict[str, Tensor]

    def errors(self, truth: Outcome) -> dict[str, float]:
        result = {}
        for name, value in truth.values.items():
            floor = FLOOR_LOSS if name == "loss" else FLOOR_GRADIENT
            off = (self.values[name].double().cpu() - value.double().cpu()).norm()
            result[name] = (off / value.double().norm().clamp_min(floor * value.numel() ** 0.5)).item()
        return result


def placed(value: Any, device: str) -> Any:
    """A copy on the device, also of tensors in lists and pairs."""
    if isinstance(value, (list, tuple)):
        return type(value)(placed(v, device) for v in value)
    return value.clone().to(device) if isinstance(value, Tensor) else value


def run(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu", exact: bool = False) -> Outcome:
    """Loss and all gradients for an upstream gradient that is not 1. ``exact`` promotes the dtype's values to
    float64."""
    z1, z2 = (z.to(dtype) for z in case.embeddings(dtype))
    if exact:
        z1, z2 = z1.double(), z2.double()
    z1, z2 = (z.detach().clone().to(device).requires_grad_() for z in (z1, z2))
    options = {name: placed(v, device) for name, v in case.options.items()}
    leaves = {"dz1": z1, "dz2": z2}
    tau: Any = case.temperature
    m: Any = case.m
    if case.tensors:
        tau = leaves["dtemperature"] = torch.tensor(tau, dtype=torch.float64, device=device, requires_grad=True)
        if case.focal:
            m = leaves["dm"] = torch.tensor(m, dtype=torch.float64, device=device, requires_grad=True)
    if "weight" in options:
        options["weight"] = leaves["dweight"] = options["weight"].double().requires_grad_()
    if case.focal:
        loss = fused_focal_infonce(z1, z2, tau, m, backend=backend, **options)
    else:
        loss = fused_infonce(z1, z2, tau, backend=backend, **options)
    upstream = torch.linspace(0.5, 3, loss.numel(), dtype=loss.dtype, device=device).reshape(loss.shape)
    loss.backward(upstream)
    return Outcome({"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})


def check(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Raises AssertionError where the backend leaves its budget."""
    held(lambda *given, **more: run(case, *given, **more), backend, dtype, device)


def held(
    run: Callable[..., Outcome],
    backend: str,
    dtype: torch.dtype,
    device: str,
    bands: Callable[[str], float] = lambda name: 1.0,
) -> None:
    """Raises AssertionError where what ``run`` gives is not finite, or leaves its budget. ``bands``: how many rounding
    bands a result has."""
    truth = run("reference", dtype, exact=True)
    eager = run("reference", dtype, device).errors(truth)
    actual = run(backend, dtype, device)
    for name, value in actual.values.items():
        assert torch.isfinite(value).all(), f"{name} is not finite"
    for name, error in actual.errors(truth).items():
        budget = 2 * eager[name] + BAND[dtype] * bands(name)
        assert error <= budget, f"{name}: error {error:.2e} over the budget {budget:.2e} (eager {eager[name]:.2e})"
