"""Uniformity, forward + backward, beside eager PyTorch on the Gram matrix and the floor of its own GEMMs.

    python -m benchmarks.uniformity            the table of docs/performance.md, under a minute on 2 cores
    python -m benchmarks.uniformity --short    a small size only; what CI runs
    python -m benchmarks.uniformity --json F   also writes the numbers to F

Every row first asserts that loss and gradient agree with eager. Times are minima of interleaved rounds. The floor is the 3 N^2 D
operations of triangular panels: torch.mm into preallocated memory, and nothing between.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import arguments, in_new_process, interleaved, peak_memory, save
from pycse import uniformity

SIZES = [(512, 768), (2048, 768), (8192, 768)]


def eager(z: Tensor) -> Tensor:
    """On the Gram matrix, exp(4 (s - 1)) with the diagonal out: ten times faster than torch.pdist."""
    z = F.normalize(z, dim=1)
    N = len(z)
    e = (4 * (z @ z.t() - 1)).exp()
    return (e.sum() - e.diagonal().sum()).log() - math.log(N * (N - 1))


def floor(z: Tensor, c: int) -> Callable[[], None]:
    z = z.detach()
    N = len(z)
    memory, g = torch.empty(c * N), torch.zeros_like(z)

    def run() -> None:
        for i in range(0, N, c):
            rows, keys = z[i : i + c], z[i:]
            S = memory[: len(rows) * len(keys)].view(len(rows), len(keys))
            torch.mm(rows, keys.t(), out=S)
            g[i : i + c].addmm_(S, keys)
            g[i + c :].addmm_(S[:, c:].t(), rows)

    return run


def points(N: int, D: int) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0)).requires_grad_()


def step(loss: Callable[[Tensor], Tensor], z: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        z.grad = None
        value = loss(z)
        value.backward()
        return value.detach()

    return run


def measure(N: int, D: int, budget: float) -> dict[str, float]:
    z = points(N, D)
    ours, theirs = step(uniformity, z), step(eager, z)
    expected = theirs()
    gradient = z.grad.clone()  # type: ignore[union-attr]
    parity = (ours() - expected).abs().item()
    parity = max(parity, ((z.grad - gradient).norm() / gradient.norm()).item())  # type: ignore[operator]
    assert parity < 1e-4, f"N = {N}: off by {parity:.1e} from eager"
    calls: dict[str, Callable[[], object]] = {"pycse": ours, "eager": theirs}
    panels = sorted({min(N, c) for c in (512, 1024)})
    t = interleaved(calls | {f"floor {c}": floor(z, c) for c in panels}, budget)
    best = t["pycse"].best
    return {
        "N": N,
        "D": D,
        "parity": parity,
        "pycse": best,
        "eager/pycse": t["eager"].best / best,
        "floor/pycse": min(t[f"floor {c}"].best for c in panels) / best,
        "spread": t["pycse"].spread,
    }


def memory(N: int, D: int) -> int:
    """Peak bytes above input and gradient."""
    step(uniformity, points(256, D))()  # libraries are loaded
    z = points(N, D)
    return peak_memory(step(uniformity, z)) - z.nbytes


def main() -> None:
    chosen = arguments(__doc__, "a small size only")
    print("| N | D | parity | pycse ms | eager/pycse | floor/pycse | spread |\n|---|---|---|---|---|---|---|")
    rows = []
    for N, D in SIZES[:1] if chosen.short else SIZES:
        r = measure(N, D, 1.0 if chosen.short else 12.0)
        rows.append(r)
        print(
            f"| {N} | {D} | {r['parity']:.0e} | {r['pycse'] * 1e3:.3f} | {r['eager/pycse']:.2f} | {r['floor/pycse']:.3f} "
            f"| {r['spread']:.0%} |",
            flush=True,
        )
    more = {}
    if not chosen.short:
        more["memory"] = peak = in_new_process(memory, 32768, 768)
        print(f"\npeak memory above input and gradient, N = 32768, D = 768: {peak / 1e6:.0f} MB (the pairs: 4295 MB)")
    save(chosen.json, rows=rows, **more)


if __name__ == "__main__":
    main()
