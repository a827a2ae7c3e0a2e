"""Students and teachers of a distillation, and its backends held to the float64 reference."""

from __future__ import annotations

import torch

from pycse import fused_distill

BAND = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 2e-3}


def batch(B=33, D=40, dtype=torch.float64, kind="random", teachers=(24, 56), seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(B, D, generator=g, dtype=torch.float64)
    es = [z[:, :k] + 0.8 * torch.randn(B, min(k, D), generator=g, dtype=torch.float64) for k in teachers]
    if kind == "zeros":
        z[0] = 0
        for e in es:
            e[-1] = 0
    if kind == "equal":
        for e in es:
            e[:] = e[0]
    if kind == "duplicates":
        for e in es:
            e[1::2] = e[: B - 1 : 2][: len(e[1::2])]
    if kind == "scales":
        z = z * 10 ** torch.linspace(-8, 8, B, dtype=torch.float64)[:, None]
    return z.to(dtype), [e.to(dtype) for e in es]


def results(z, teachers, backend, dtype, **options):
    z = z.to(dtype).detach().requires_grad_()
    loss = fused_distill(z, [e.to(dtype) for e in teachers], backend=backend, **options)
    loss.backward(torch.linspace(0.5, 3, loss.numel(), dtype=loss.dtype).reshape(loss.shape))
    return loss.detach().double(), z.grad.double()


def check(z, teachers, backend, dtype, **options):
    """Values are those of ``dtype``; the budget is twice the error of plain PyTorch in it, plus a band."""
    z, teachers = z.to(dtype), [e.to(dtype) for e in teachers]
    truth = results(z, teachers, "reference", torch.float64, **options)
    eager = results(z, teachers, "reference", torch.float32 if dtype == torch.float16 else dtype, **options)
    ours = results(z, teachers, backend, dtype, **options)
    for name, t, e, o in zip(("loss", "dz"), truth, eager, ours):
        scale = t.norm().clamp_min(0.1 if name == "dz" else 1e-6)
        off, allowed = (o - t).norm() / scale, 2 * (e - t).norm() / scale + BAND[dtype]
        assert torch.isfinite(o).all()
        assert off <= allowed, f"{name}: off by {off:.1e}, allowed {allowed:.1e}"
