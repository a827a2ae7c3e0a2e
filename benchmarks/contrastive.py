"""Focal-InfoNCE, forward + backward, beside eager PyTorch, torch.compile and the floor of its own GEMMs.

    python -m benchmarks.contrastive            the tables of docs/performance.md, about 8 minutes on 2 cores
    python -m benchmarks.contrastive --short    small sizes only, under a minute; what CI runs
    python -m benchmarks.contrastive --json F   also writes the numbers to F

Every row first asserts that loss and gradients agree with eager. Times are minima of interleaved rounds; large sizes are
measured in two processes, with glibc's allocator as it comes and with its mmap and trim thresholds raised.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date

import torch
import torch.nn.functional as F
from torch import Tensor

import pycse
from benchmarks.measure import RAISED, interleaved, machine, peak_memory

TAU, M = 0.05, 0.3


def eager(z1: Tensor, z2: Tensor) -> Tensor:
    """What people write: normalise, matmul, focal logits, cross_entropy."""
    s = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).t()
    target = torch.arange(len(z1))
    logits = s * (s + M) / TAU
    positive = s.diagonal() ** 2 / TAU
    logits = logits.diagonal_scatter(positive)
    return F.cross_entropy(logits, target)


def floor(z1: Tensor, z2: Tensor, c: int) -> Callable[[], None]:
    """The three products in panels of c rows with torch.mm into preallocated memory, and nothing between them."""
    N, D = z1.shape
    z1, z2 = z1.detach(), z2.detach()
    S, dz1, dz2 = torch.empty(c, N, dtype=z1.dtype), torch.empty_like(z1), torch.zeros(N, D)
    product = torch.empty_like(z1)

    def run() -> None:
        for i in range(0, N, c):
            rows = z1[i : i + c]
            torch.mm(rows, z2.t(), out=S)
            torch.mm(S, z2, out=dz1[i : i + c])
            if z1.dtype == torch.float32:
                dz2.addmm_(S.t(), rows)
            else:  # a 16-bit accumulator would lose the sum
                dz2.add_(torch.mm(S.t(), rows, out=product))

    return run


def embeddings(N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z1 = torch.randn(N, D)
    z2 = z1 + 2 * torch.randn(N, D)  # positives at a cosine of 0.45: a loss that is neither solved nor noise
    return z1.to(dtype).requires_grad_(), z2.to(dtype).requires_grad_()


def step(loss: Callable[[Tensor, Tensor], Tensor], z1: Tensor, z2: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        z1.grad = z2.grad = None
        value = loss(z1, z2)
        value.backward()
        return value

    return run


def parity(z1: Tensor, z2: Tensor) -> float:
    """Largest relative difference of loss and gradients to eager in float32; raises where it is more than rounding."""
    results = []
    for loss, dtype in ((pycse.fused_focal_infonce, z1.dtype), (eager, torch.float32)):
        a, b = (z.detach().to(dtype).requires_grad_() for z in (z1, z2))
        value = step(loss, a, b)().detach()
        assert a.grad is not None and b.grad is not None
        results.append((value.double(), a.grad.double(), b.grad.double()))
    worst = max(((x - y).norm() / y.norm()).item() for x, y in zip(*results))
    if not worst < (1e-4 if z1.dtype == torch.float32 else 0.1):
        raise SystemExit(f"parity failed: {tuple(z1.shape)} {z1.dtype} differs from eager in float32 by {worst:.1e}")
    return worst


def measure(N: int, D: int, dtype: torch.dtype, compiled: bool, budget: float) -> dict[str, float]:
    z1, z2 = embeddings(N, D, dtype)
    ours, theirs = step(pycse.fused_focal_infonce, z1, z2), step(eager, z1, z2)
    result: dict[str, float] = {"parity": parity(z1, z2)}
    # Two groups: peers' N x N temporaries change the state of the allocator, for whoever comes next.
    peers: dict[str, Callable[[], object]] = {"pycse": ours, "eager": theirs}
    if compiled:
        peers["compile"] = step(torch.compile(eager), z1, z2)
    floors: dict[str, Callable[[], object]] = {"pycse": ours}
    floors |= {f"floor {c}": floor(z1, z2, min(c, N)) for c in (512, 1024, 2048) if c <= N or c == 512}
    for calls in (floors, peers):
        times = interleaved(calls, budget)
        ours_best = times["pycse"].best
        result |= {f"{name}/pycse": timing.best / ours_best for name, timing in times.items() if name != "pycse"}
        result.setdefault("pycse", ours_best)
        result["spread"] = max(result.get("spread", 0.0), *(timing.spread for timing in times.values()))
    return result


def memory(N: int, D: int, threads: int) -> float:
    """Peak bytes above inputs and gradients of one forward + backward() from 1."""
    torch.set_num_threads(threads)
    z1, z2 = embeddings(2048, D, torch.float32)
    step(pycse.fused_focal_infonce, z1, z2)()  # MKL's own packing buffers, which every product in the process shares
    z1, z2 = embeddings(N, D, torch.float32)
    run = step(pycse.fused_focal_infonce, z1, z2)
    return peak_memory(run) - 2 * N * D * 4


def import_seconds() -> float:
    code = "import torch, time; t = time.perf_counter(); import pycse; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return min(float(run.stdout) for run in runs)


LARGE = [(8192, 768, "float32"), (8192, 384, "float32"), (8192, 768, "bfloat16")]
SMALL = [
    (64, 768, "float32"),
    (128, 768, "float32"),
    (512, 768, "float32"),
    (64, 768, "bfloat16"),
    (512, 768, "bfloat16"),
]
SHORT = [(64, 768, "float32"), (512, 256, "float32"), (1024, 256, "bfloat16")]


def child(kind: str) -> None:
    """Measures in this process, whose environment the parent chose, and prints JSON."""
    if kind == "memory":
        print(json.dumps({"memory": memory(32768, 768, torch.get_num_threads())}))
        return
    sizes, budget = {"large": (LARGE, 16.0), "small": (SMALL, 4.0), "short": (SHORT, 1.0)}[kind]
    compiled = kind == "large"
    print(json.dumps([measure(N, D, getattr(torch, dtype), compiled, budget) for N, D, dtype in sizes]))


def in_child(kind: str, tunables: str = "") -> list[dict[str, float]]:
    env = {**os.environ, "GLIBC_TUNABLES": tunables} if tunables else dict(os.environ)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.contrastive", "--child", kind],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def table(title: str, sizes: list[tuple[int, int, str]], rows: list[dict[str, float]]) -> None:
    print(f"\n{title}\n")
    print(
        "| N | D | dtype | parity | pycse ms | floor 512/pycse | best floor/pycse | eager/pycse | compile/pycse | spread |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (N, D, dtype), row in zip(sizes, rows):
        best = min((name for name in row if name.startswith("floor")), key=lambda name: row[name])
        compiled = f"{row['compile/pycse']:.2f}" if "compile/pycse" in row else "-"
        print(
            f"| {N} | {D} | {dtype} | {row['parity']:.0e} | {row['pycse'] * 1e3:.3f} | {row['floor 512/pycse']:.3f} "
            f"| {row[best]:.3f} ({best.split('/')[0].split()[1]}) | {row['eager/pycse']:.2f} | {compiled} "
            f"| {row['spread']:.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="small sizes only")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--child", choices=["large", "small", "short", "memory"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)

    print(f"{date.today()}  {machine()}")
    print("floor/pycse is the share of the floor reached (GEMMs only, panels of 512 rows; then the best panel size)")
    numbers: dict[str, object] = {"date": str(date.today()), "machine": machine()}
    if arguments.short:
        numbers["short"] = rows = in_child("short")
        table("short", SHORT, rows)
    else:
        for key, kind, sizes, tunables, title in (
            ("small", "small", SMALL, "", "small batches"),
            ("large", "large", LARGE, "", "large, allocator as it comes (GLIBC_TUNABLES unset)"),
            ("large_raised", "large", LARGE, RAISED, f"large, GLIBC_TUNABLES={RAISED}"),
        ):
            numbers[key] = rows = in_child(kind, tunables)
            table(title, sizes, rows)
        numbers["memory"] = peak = in_child("memory")["memory"]  # type: ignore[call-overload]
        print(f"\npeak memory above inputs and gradients, N = 32768, D = 768, float32: {peak / 2**20:.1f} MiB")
    numbers["import"] = seconds = import_seconds()
    print(f"import pycse beyond importing torch: {seconds * 1e3:.0f} ms")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(numbers, file, indent=1)


if __name__ == "__main__":
    main()
