"""What the rows of benchmarks/gpu.py share: sizes and clocks, data, the truth in float32, the floor, peers."""

from __future__ import annotations

import contextlib
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycse import backends, fused_focal_infonce, fused_infonce

TAU, M = 0.05, 0.3
Step = Callable[[], Any]


class Plan:
    """Sizes, and how this machine measures. A dry run takes the same steps on the processor."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.backends = ("torch", "reference") if dry else ("triton", "cuda")
        self.dtype = torch.bfloat16
        self.D = 16 if dry else 768
        self.large = 96 if dry else 65536
        self.peers = (48, 96) if dry else (8192, 16384, 32768, 65536)
        self.panels = (32, 96) if dry else (1024, 2048, 2304, 4096, 8192)  # 2304: whole rounds of 132 multiprocessors
        self.small = (8, 16) if dry else (64, 128, 256, 512)
        self.distill_small, self.distill_large = ((48, 3), (64, 2)) if dry else ((64, 16), (16384, 4))
        self.layer = (64, 128, 256) if dry else (8192, 768, 3072)  # tokens, in, out
        self.rounds = 2 if dry else 10
        self.cache = torch.empty(0 if dry else 128 << 20, dtype=torch.int32, device=self.device)

    def interleaved(self, steps: dict[str, Step], rounds: int = 0, cold: bool = False) -> dict[str, dict[str, float]]:
        """Milliseconds of each step, taken in turn: median, least and most. ``cold``: L2 is flushed before each."""
        for step in steps.values():
            step(), step()
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds or self.rounds):
            for name, step in steps.items():
                if cold:
                    self.cache.zero_()
                    self._busy()
                times[name].append(self._milliseconds(step))
        return {name: _summary(t) for name, t in times.items()}

    def _busy(self) -> None:
        """Keeps the device at work for half a millisecond, while the host hands it the launches to be timed."""
        if not self.dry:
            torch.cuda._sleep(1_000_000)

    def _milliseconds(self, step: Step) -> float:
        if self.dry:
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def graph(self, step: Step, repeat: int = 1) -> Step:
        """A CUDA graph of ``repeat`` steps one after the other, as a step that returns their results."""
        if self.dry:
            return lambda: [step() for _ in range(repeat)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(), step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [step() for _ in range(repeat)]
        return lambda: (graph.replay(), kept)[1]

    def peak(self, step: Step) -> int:
        """Bytes allocated at the highest above those before; 0 on the processor."""
        if self.dry:
            step()
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak

    def tidy(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def usable(self) -> list[str]:
        """The backends of this machine; what cannot run is said in the results by ``missing``."""
        return [name for name in self.backends if backends.unusable(name) is None]

    def missing(self) -> dict[str, str]:
        reasons = {name: backends.unusable(name) for name in self.backends}
        return {name: reason for name, reason in reasons.items() if reason is not None}


def _summary(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


# --- what is timed and checked in another way than the default ---


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def routes(name: str) -> dict[str, Callable[[], contextlib.AbstractContextManager[Any]]]:
    """The ways that a backend has for a contrastive problem, each with what makes it take this one."""
    if name != "cuda":
        return {name: contextlib.nullcontext}
    backend = importlib.import_module("pycse.backends.cuda.contrastive")

    @contextlib.contextmanager
    def by_panels(fused: int) -> Iterator[None]:
        with replaced(backend, "fits", lambda p: False), replaced(backend, "FUSED", fused):
            yield

    fused = {"cuda, fused": 1, "cuda, fused in clusters": 2}
    return {"cuda": contextlib.nullcontext} | {
        route: functools.partial(by_panels, n) for route, n in {"cuda, panels": 0, **fused}.items()
    }


# --- data and truth ---


def embeddings(plan: Plan, B: int, D: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Views whose positive has a cosine of about 0.45: neither lost among the negatives nor certain."""
    g = torch.Generator(plan.device).manual_seed(seed)
    z = [torch.randn(B, D or plan.D, device=plan.device, generator=g) for _ in range(2)]
    return z[0].to(plan.dtype).requires_grad_(), (0.5 * z[0] + z[1]).to(plan.dtype).requires_grad_()


def focal_logits(s: Tensor, positives: Tensor, m: float = M) -> Tensor:
    l = s * (s + m)
    at = positives[:, None]
    return l.scatter(1, at, s.gather(1, at) ** 2) / TAU


def eager(z1: Tensor, z2: Tensor, focal: bool = True, symmetric: bool = False) -> Tensor:
    """Normalise, matmul, logits, cross entropy: what one writes in plain PyTorch."""
    s = (F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).t()).float()
    labels = torch.arange(len(z1), device=z1.device)
    l = focal_logits(s, labels) if focal else s / TAU
    loss = F.cross_entropy(l, labels)
    return (loss + F.cross_entropy(l.t(), labels)) / 2 if symmetric else loss


def truth(z1: Tensor, z2: Tensor, focal: bool = True, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both gradients in float32, some rows at a time."""
    a, b = (z.detach().float().requires_grad_() for z in (z1, z2))
    B, c, total = len(a), min(len(a), 4096), torch.zeros((), device=a.device)
    for x, y in ((a, b), (b, a)) if symmetric else ((a, b),):
        for i in range(0, B, c):
            labels = torch.arange(i, min(i + c, B), device=a.device)
            s = F.normalize(x[i : i + c], dim=1) @ F.normalize(y, dim=1).t()
            part = F.cross_entropy(focal_logits(s, labels) if focal else s / TAU, labels, reduction="sum")
            part = part / (2 * B if symmetric else B)
            part.backward()
            total += part.detach()
    assert a.grad is not None and b.grad is not None
    return total, a.grad, b.grad


def off(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative error in norm."""
    errors = [((x.float() - y).norm() / y.norm().clamp_min(1e-12)).item() for x, y in zip(results, expected)]
    return max(e if e == e else float("inf") for e in errors)


def parity(name: str, results: tuple[Tensor, ...], expected: tuple[Tensor, ...], limit: float = 3e-2) -> float:
    error = off(results, expected)
    if not error < limit:
        raise AssertionError(f"{name} is off by {error:.1e} from plain PyTorch in float32 (allowed: {limit:.0e})")
    return error


def step_of(loss: Callable[[Tensor, Tensor], Tensor], z1: Tensor, z2: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward + backward: the loss and both gradients."""

    def step() -> tuple[Tensor, ...]:
        value = loss(z1, z2)
        return value.detach(), *torch.autograd.grad(value, (z1, z2))

    return step


def ours(backend: str, focal: bool = True, symmetric: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    call = functools.partial(fused_focal_infonce, m=M) if focal else fused_infonce
    return functools.partial(call, temperature=TAU, symmetric=symmetric, backend=backend)


def floor(z1: Tensor, z2: Tensor, c: int, sweeps: int = 1, wide: bool = True) -> Step:
    """The products alone, in panels of c rows into preallocated memory, dK summed in float32 (``wide``: by the product
    itself, otherwise by an addition after it). ``sweeps`` 2: S is computed twice, as the symmetric loss does."""
    z1, z2 = z1.detach(), z2.detach()
    (B, D), N = z1.shape, len(z2)
    new = functools.partial(torch.empty, dtype=z1.dtype, device=z1.device)
    S, g1, product = new(c, N), new(c, D), None if wide else new(N, D)
    g2 = torch.zeros(N, D, device=z1.device)
    scale = N**-0.5  # S stands in for G

    def run() -> None:
        for i in range(0, B, c):
            part = z1[i : i + c]
            G = S[: len(part)]
            for _ in range(sweeps):
                torch.mm(part, z2.t(), out=G)
            torch.mm(G, z2, out=g1[: len(part)])
            if product is not None:
                g2.add_(torch.mm(G.t(), part, out=product), alpha=scale)
            else:
                torch.addmm(g2, G.t(), part, alpha=scale, out_dtype=torch.float32, out=g2)

    return run


def floors(plan: Plan, z1: Tensor, z2: Tensor, sweeps: int = 1) -> dict[str, Step]:
    steps = {}
    for c in plan.panels:
        for wide in (False, True):
            step = floor(z1, z2, c, sweeps, wide)
            if wide:
                try:
                    step()
                except (TypeError, RuntimeError):  # NotImplementedError too: no such product here
                    continue
            steps[f"floor {c}{' wide' if wide else ''}"] = step
    return steps


# --- peers ---


def siglip() -> Callable[[Tensor, Tensor], Tensor]:
    """Another loss (a sigmoid for each pair) over the same products; its inputs come normalised, which is left out of
    its time."""
    module = importlib.import_module("siglip_kernel")

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        return module.fused_siglip_loss(
            z1, z2, torch.full((), 3.0, device=z1.device), torch.full((), -10.0, device=z1.device)
        )

    return loss


def siglip_eager(z1: Tensor, z2: Tensor) -> Tensor:
    l = torch.exp(torch.tensor(3.0, device=z1.device)) * (z1 @ z2.t()) - 10.0
    sign = 2 * torch.eye(len(z1), device=z1.device) - 1
    return -F.logsigmoid(sign * l).sum() / len(z1)


def memeff() -> Callable[[Tensor, Tensor], Tensor]:
    return importlib.import_module("memeff").MemoryEfficientCLIPLoss(
        temperature=TAU, normalized_inputs=False, stable=False
    )


def inf_cl() -> Callable[[Tensor, Tensor], Tensor]:
    flash = importlib.import_module("inf_cl").cal_flash_loss

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        return flash(
            F.normalize(z1, dim=1), F.normalize(z2, dim=1), scale=1 / TAU, head_dim=min(256, z1.shape[1])
        ).mean()

    return loss


def compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(eager)


# name: its loss, what it is compared with here (focal, symmetric), its own loss in plain PyTorch
PEERS: dict[str, tuple[Callable[[], Any], tuple[bool, bool], Any]] = {
    "siglip-kernel": (siglip, (True, False), siglip_eager),
    "memeff": (memeff, (False, True), functools.partial(eager, focal=False, symmetric=True)),
    "inf-cl": (inf_cl, (False, False), functools.partial(eager, focal=False)),
    "eager": (lambda: eager, (True, False), eager),
    "compile": (compiled, (True, False), eager),
}


def normalised(z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.normalize(z.detach(), dim=1).requires_grad_() for z in (z1, z2))


def beside(plan: Plan, name: str) -> dict[str, Any]:
    """A peer at every size that it can run, beside the same loss of ours (siglip-kernel: beside Focal-InfoNCE)."""
    load, (is_focal, is_symmetric), own = PEERS[name]
    if name == "compile" and plan.dry:
        return {"missing": "left out of a dry run: it takes a minute"}
    try:
        loss = load()
    except ImportError as problem:
        return {"missing": str(problem)}
    prepared = normalised if name == "siglip-kernel" else lambda *z: z
    z1, z2 = prepared(*embeddings(plan, 64 if plan.dry else 2048))
    wide = [z.detach().float().requires_grad_() for z in (z1, z2)]
    row: dict[str, Any] = {"parity": parity(name, step_of(loss, z1, z2)(), step_of(own, *wide)(), 1e-1), "sizes": {}}
    for B in plan.peers:
        pair = embeddings(plan, B)
        steps = {n: step_of(ours(n, is_focal, is_symmetric), *pair) for n in plan.usable()}
        try:
            t = plan.interleaved({**steps, name: step_of(loss, *prepared(*pair))}, rounds=5)
        except Exception as problem:  # out of memory, mostly: what it cannot run
            row["sizes"][f"{B}"] = f"{type(problem).__name__}: {problem}"[:200]
            break
        row["sizes"][f"{B}"] = {"ms": t, "ratio": t[name]["median"] / min(t[n]["median"] for n in steps)}
        del pair, steps
        plan.tidy()
    return row
