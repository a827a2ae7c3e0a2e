"""DistillCSE, forward + backward, beside vectorised eager PyTorch and the floor of its own GEMMs.

    python -m benchmarks.distill            about 3 minutes on 2 cores
    python -m benchmarks.distill --short    the small batches only
    python -m benchmarks.distill --json F   also writes the numbers to F

Every row first asserts that loss and gradient without a shuffle agree with eager; times are minima of interleaved rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import arguments, in_new_process, interleaved, peak_memory, save
from pycse import fused_distillcse

TAU, STUDENT, TEACHER, P = 0.05, 0.025, 0.0125, 0.1
SMALL = [(64, 1), (64, 16), (512, 4)]
LARGE = [(4096, 4)]


def eager(z1: Tensor, z2: Tensor, teachers: list[Tensor], shuffle: bool = True) -> Tensor:
    """Well-vectorised: matmul, sort, cumsum, argsort of group + noise, gather, log_softmax."""
    B = len(z1)
    a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    contrastive = F.cross_entropy(a @ b.t() / TAU, torch.arange(B))
    diagonal = torch.eye(B, dtype=torch.bool)
    with torch.no_grad():
        units = [F.normalize(e, dim=1) for e in teachers]
        t = (sum(e @ e.t() for e in units) / len(units)).masked_fill(diagonal, -torch.inf)
        t, order = t.sort(dim=1, descending=True)
        if shuffle:
            group = (t.softmax(1).cumsum(1) / P).floor()
            order = order.gather(1, (group + torch.rand(B, B)).argsort(1))
        q = (t / TEACHER).softmax(1)
    log_p = ((a @ a.t()) / STUDENT).masked_fill(diagonal, -1e4).log_softmax(1)
    return contrastive - (q * log_p.gather(1, order)).sum(1).mean()


def floor(z1: Tensor, z2: Tensor, teachers: list[Tensor], c: int) -> Callable[[], None]:
    """The seven products in panels of c rows into preallocated memory, and nothing between them."""
    B, D = z1.shape
    z1, z2, e = z1.detach(), z2.detach(), torch.cat(teachers, 1)
    S, T, dz1, dz2, rows = (torch.empty(s) for s in ((c, B), (c, B), (B, D), (B, D), (c, D)))

    def run() -> None:
        for i in range(0, B, c):
            part = z1[i : i + c]
            torch.mm(part, z2.t(), out=S)
            torch.mm(S, z2, out=rows)
            dz2.addmm_(S.t(), part)
            torch.mm(e[i : i + c], e.t(), out=T)
            torch.mm(part, z1.t(), out=S)
            torch.mm(S, z1, out=rows)
            dz1.addmm_(S.t(), part)

    return run


def batch(B: int, K: int, D: int = 768) -> tuple[Tensor, Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    new = lambda: torch.randn(B, D, generator=g)  # noqa: E731
    z1 = new()
    z2, base = z1 + 0.5 * new(), z1 + new()
    return z1.requires_grad_(), z2.requires_grad_(), [base + new() for _ in range(K)]


def measure(B: int, K: int, budget: float) -> dict[str, float]:
    z1, z2, teachers = batch(B, K)

    def step(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            z1.grad = z2.grad = None
            value = loss()
            value.backward()
            return value

        return run

    ours = lambda shuffle: step(lambda: fused_distillcse(z1, z2, teachers, shuffle=shuffle, seed=1).loss)  # noqa: E731
    expected = step(lambda: eager(z1, z2, teachers, shuffle=False))()
    gradient = z1.grad.clone()
    parity = abs(ours("none")() / expected - 1).item()
    parity = max(parity, ((z1.grad - gradient).norm() / gradient.norm()).item())
    assert parity < 1e-4, f"B = {B}, {K} teachers: off by {parity:.1e} from eager"

    calls: dict[str, Callable[[], object]] = {s: ours(s) for s in ("sample", "expected", "none")}
    calls["eager"] = step(lambda: eager(z1, z2, teachers))
    panels = sorted({min(B, c) for c in (512, 1024)})
    for c in panels:
        calls[f"floor {c}"] = floor(z1, z2, teachers, c)
    t = interleaved(calls, budget)
    floor_best = min(t[f"floor {c}"].best for c in panels)
    return {
        "B": B,
        "teachers": K,
        "parity": parity,
        "sample": t["sample"].best,
        "eager/sample": t["eager"].best / t["sample"].best,
        "floor/sample": floor_best / t["sample"].best,
        "sample/none": t["sample"].best / t["none"].best,
        "expected/none": t["expected"].best / t["none"].best,
        "spread": t["sample"].spread,
    }


def memory(B: int, K: int) -> int:
    """Peak bytes above inputs and gradients."""
    z1, z2, teachers = batch(B, K)

    def call() -> None:
        fused_distillcse(z1, z2, teachers, seed=1).loss.backward()

    few = slice(2048)  # MKL's own packing buffers, which every product in the process shares
    fused_distillcse(z1[few], z2[few], [e[few] for e in teachers], seed=1).loss.backward()
    z1.grad = z2.grad = None
    return peak_memory(call) - z1.nbytes - z2.nbytes


def main() -> None:
    chosen = arguments(__doc__, "small batches only")
    print("| B | teachers | parity | sample ms | eager/sample | floor/sample | sample/none | expected/none | spread |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for B, K in SMALL if chosen.short else SMALL + LARGE:
        r = measure(B, K, 1.0 if chosen.short else 25.0 if B > 1000 else 4.0)
        rows.append(r)
        print(
            f"| {B} | {K} | {r['parity']:.0e} | {r['sample'] * 1e3:.3f} | {r['eager/sample']:.2f} | {r['floor/sample']:.3f} "
            f"| {r['sample/none']:.2f} | {r['expected/none']:.2f} | {r['spread']:.0%} |",
            flush=True,
        )
    more = {}
    if not chosen.short:
        more["memory"] = peak = in_new_process(memory, 16384, 4)
        print(f"\npeak memory above inputs and gradients, B = 16384, 4 teachers, D = 768: {peak / 1e6:.0f} MB")
    save(chosen.json, rows=rows, **more)


if __name__ == "__main__":
    main()
