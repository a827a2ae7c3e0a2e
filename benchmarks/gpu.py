"""Every row of the H200 table, beside its floor and its peers, and the tuner: a run of about 3 minutes on one GPU.

    python -m benchmarks.gpu                 all rows, writes gpu-DATE.json and gpu-DATE.md to benchmarks/results
    python -m benchmarks.gpu --only focal    rows whose name begins so (also: tune, profile)
    python -m benchmarks.gpu --exercise      each kernel once on small ragged shapes, for compute-sanitizer
    python -m benchmarks.gpu --dry-run       all of it in tiny on the processor: no number means anything

benchmarks/gpu.sh builds and tests first. A row first asserts parity with plain PyTorch in float32; then alternatives
take turns and CUDA events time them. Shares and ratios are of medians, times too. Small batches and layers are timed as
CUDA graphs. A row that fails says so in the results and does not stop the others.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_parts as parts
from benchmarks.gpu_exercise import exercise
from benchmarks.gpu_parts import TAU, Plan, Step, embeddings, ours, parity, replaced, routes, step_of
from pycse import fused_distillcse
from pycse.panels import contrastive as panel
from pycse.pattern import Pattern

# --- rows ---


def ceilings(plan: Plan) -> dict[str, Any]:
    """What the machine gives today: copies in TB/s, a bf16 product in TF/s."""
    n = 128 if plan.dry else 8192
    a, b = (torch.randn(n, n, device=plan.device).to(plan.dtype) for _ in range(2))
    out, x = torch.empty_like(a), torch.empty(1 << (12 if plan.dry else 30), device=plan.device)
    y = torch.empty_like(x)
    t = plan.interleaved({"product": lambda: torch.mm(a, b, out=out), "copy": lambda: y.copy_(x)})
    return {
        "product TF/s": 2e-9 * n**3 / t["product"]["median"],
        "copy TB/s": 8e-9 * len(x) / t["copy"]["median"],
    }


def focal(plan: Plan, symmetric: bool = False) -> dict[str, Any]:
    z1, z2 = embeddings(plan, plan.large)
    expected = parts.truth(z1, z2, symmetric=symmetric)
    steps = {name: step_of(ours(name, symmetric=symmetric), z1, z2) for name in plan.usable()}
    row: dict[str, Any] = {"parity": {name: parity(name, step(), expected) for name, step in steps.items()}}
    del expected
    # Inputs and gradients are not counted: the gradients are the step's result.
    results = 2 * z1.numel() * z1.element_size()
    row["peak MB"] = {name: (plan.peak(step) - results) / 1e6 for name, step in steps.items()}
    t = plan.interleaved({**steps, **parts.floors(plan, z1, z2, 2 if symmetric else 1)})
    best = min(t[name]["median"] for name in t if name.startswith("floor"))
    operations = (8 if symmetric else 6) * plan.large**2 * plan.D
    row["ms"] = t
    row["TF/s"] = {name: 1e-9 * operations / v["median"] for name, v in t.items()}
    row["share of the floor"] = {name: best / t[name]["median"] for name in steps}
    return row


def small(plan: Plan) -> dict[str, Any]:
    """B = 64 to 512: forward + backward in a CUDA graph, microseconds a step."""
    row = {}
    for B in plan.small:
        z1, z2 = embeddings(plan, B)
        expected = parts.truth(z1, z2)
        steps = {name: step_of(ours(name), z1, z2) for name in plan.usable()} | {"eager": step_of(parts.eager, z1, z2)}
        errors = {
            name: parity(name, step(), expected, 1e-1 if name == "eager" else 3e-2) for name, step in steps.items()
        }
        repeat = 10
        t = plan.interleaved({name: plan.graph(step, repeat) for name, step in steps.items()})
        us = {name: {k: 1e3 * x / repeat for k, x in v.items()} for name, v in t.items()}
        calls = plan.interleaved(steps)  # as a program that captures nothing sees it: launches and Python
        row[f"{B}"] = {"parity": errors, "us": us, "us, no graph": {n: 1e3 * v["median"] for n, v in calls.items()}}
    return row


def teachers_of(plan: Plan, B: int, K: int) -> list[Tensor]:
    return [embeddings(plan, B, seed=7 + k)[0].detach() for k in range(K)]


def distillation_truth(z1: Tensor, z2: Tensor, teachers: list[Tensor]) -> tuple[Tensor, ...]:
    """DistillCSE without a shuffle in float32, rows some at a time."""
    a, b = (z.detach().float().requires_grad_() for z in (z1, z2))
    units = [F.normalize(e.float(), dim=1) for e in teachers]
    B, c, total = len(a), min(len(a), 2048), torch.zeros((), device=a.device)
    for i in range(0, B, c):
        rows = torch.arange(i, min(i + c, B), device=a.device)
        diagonal = rows[:, None] == torch.arange(B, device=a.device)[None, :]
        x, y = F.normalize(a, dim=1), F.normalize(b, dim=1)
        t = sum((e[i : i + c] @ e.t() for e in units), torch.zeros((), device=a.device)) / len(units)
        q = (t / 0.0125).masked_fill(diagonal, -torch.inf).softmax(1)
        log_p = (x[i : i + c] @ x.t() / 0.025).masked_fill(diagonal, -1e4).log_softmax(1)
        part = F.cross_entropy(x[i : i + c] @ y.t() / TAU, rows, reduction="sum") - (q * log_p).sum()
        (part / B).backward()
        total += part.detach() / B
    assert a.grad is not None and b.grad is not None
    return total, a.grad, b.grad


def distillation(plan: Plan, size: tuple[int, int], captured: bool) -> dict[str, Any]:
    B, K = size
    z1, z2 = embeddings(plan, B)
    teachers, seed = teachers_of(plan, B, K), torch.tensor(1, device=plan.device)
    expected = distillation_truth(z1, z2, teachers)

    def loss(name: str, shuffle: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda a, b: fused_distillcse(a, b, teachers, TAU, shuffle=shuffle, seed=seed, backend=name).loss

    row: dict[str, Any] = {"parity": {}, "ms": {}, "sample/none": {}}
    for name in plan.usable():
        steps = {shuffle: step_of(loss(name, shuffle), z1, z2) for shuffle in ("sample", "expected", "none")}
        row["parity"][name] = parity(f"{name}, no shuffle", steps["none"](), expected, 6e-2)
        if captured:
            replay, first = plan.graph(steps["sample"]), steps["sample"]()
            seed.fill_(2)
            replayed, fresh = replay()[0], steps["sample"]()
            # Up to cuBLAS' products, which may be other ones while a graph is captured.
            change, between = (parts.off((x[1],), (fresh[1].float(),)) for x in (replayed, first))
            assert change < 1e-2, f"a replay is not the call with its seed: it is off by {change:.1e}"
            assert between > change, "two seeds, one shuffle"
            seed.fill_(1)
        repeat = 10 if captured else 1
        t = plan.interleaved({s: plan.graph(step, repeat) if captured else step for s, step in steps.items()})
        row["ms"][name] = {s: {k: x / repeat for k, x in v.items()} for s, v in t.items()}
        row["sample/none"][name] = t["sample"]["median"] / t["none"]["median"]
    return row


def layer_of(plan: Plan, block: int = 64, zeros: float = 0.75) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, W with most of its blocks zero, its mask, bias and dy."""
    T, in_, out = plan.layer
    g = torch.Generator(plan.device).manual_seed(0)
    new = lambda *n: torch.randn(*n, device=plan.device, generator=g).to(plan.dtype)  # noqa: E731
    blocks = torch.rand(out // block, in_ // block, device=plan.device, generator=g)
    mask = blocks >= blocks.flatten().quantile(zeros)
    mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return new(T, in_), new(out, in_) * mask, mask, new(out), new(T, out)


def sparse_step(plan: Plan, name: str) -> Step:
    x, w, mask, bias, _ = layer_of(plan)
    linear = importlib.import_module(f"pycse.backends.{name}.sparse").linear
    return functools.partial(linear, x, w, bias, Pattern.from_mask(mask, 64))


def layer(plan: Plan) -> dict[str, Any]:
    """y = x W^T + b with 75% of the 64 x 64 blocks zero, cold L2, over dense cuBLAS; dx and dw likewise."""
    x, w, mask, bias, dy = layer_of(plan)
    pattern = Pattern.from_mask(mask, 64)
    dense: dict[str, Step] = {
        "linear": lambda: F.linear(x, w, bias),
        "dx": lambda: dy @ w,
        "dw": lambda: dy.t() @ x,
    }
    row: dict[str, Any] = {"kept": mask.float().mean().item(), "parity": {}, "ms": {}, "over dense": {}}
    for name in plan.usable():
        module = importlib.import_module(f"pycse.backends.{name}.sparse")
        steps: dict[str, Step] = {
            "linear": functools.partial(module.linear, x, w, bias, pattern),
            "dx": functools.partial(module.dx, dy, w, pattern),
            "dw": functools.partial(module.dw, dy, x, pattern),
        }
        wide = {
            "linear": F.linear(x.float(), w.float(), bias.float()),
            "dx": dy.float() @ w.float(),
            "dw": (dy.float().t() @ x.float()) * mask,
        }
        row["parity"][name] = {k: parity(f"{name} {k}", (steps[k](),), (wide[k],), 1e-2) for k in steps}  # type: ignore[arg-type]
        t = plan.interleaved(steps | {f"dense {k}": step for k, step in dense.items()}, cold=True)
        row["ms"][name] = t
        row["over dense"][name] = {k: t[f"dense {k}"]["median"] / t[k]["median"] for k in steps}
    return row


# --- tuner ---


def tune(plan: Plan) -> dict[str, Any]:
    """Panel rows of every route, the fused GEMM's tiles and their order in the largest row, one direction; the sparse
    product's tiles. The fastest of each ("best") is for the tables of pycse/backends and panels/products.py."""
    z1, z2 = embeddings(plan, plan.large)
    expected = parts.truth(z1, z2)

    def milliseconds(name: str, step: Step | None = None) -> float | str:
        contrastive = step_of(ours(name), z1, z2)
        try:
            if step is None:
                parity(name, contrastive(), expected)
            return plan.interleaved({name: step or contrastive}, rounds=4)[name]["median"]
        except Exception as problem:  # shared memory, compilation, parity: not here
            return f"{type(problem).__name__}: {problem}"[:200]

    row: dict[str, Any] = {"panel rows": {}}
    for name in plan.usable():
        for route, settings in routes(name).items():
            times: dict[Any, Any] = {}
            for c in plan.panels:
                with settings(), replaced(panel, "panel_rows", lambda B, *_, c=c: min(B, c)):
                    times[c] = milliseconds(name)
            row["panel rows"][route] = times
    name = "triton" if "triton" in plan.usable() else plan.backends[0]
    if importlib.util.find_spec("triton") is None or (name != "triton" and not plan.dry):
        return {**row, "best": best(row)}

    backend = importlib.import_module("pycse.backends.triton.contrastive")
    sparse = importlib.import_module("pycse.backends.triton.sparse")
    alternatives: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "tiles": (backend, "tile", {str(tuple(t)): lambda *_, t=t, **__: t for t in fused_tiles(backend.Tile)}),
        "row tiles to a group": (backend, "GROUP", {str(n): n for n in (4, 8, 16, 32)}),
        "epilogue": (backend.Kernels, "_fuses", {"fused": backend.Kernels._fuses, "separate": lambda self: False}),
        "sparse tiles": (
            sparse,
            "TILES",
            {str(tuple(t)): {**sparse.TILES, "16": t} for t in sparse_tiles(sparse.Tile)},
        ),
    }
    for what, (owner, attribute, values) in alternatives.items():
        times = {}
        for label, value in values.items():
            with replaced(owner, attribute, value):
                times[label] = milliseconds(name, sparse_step(plan, name) if what == "sparse tiles" else None)
        row[what] = times
    return {**row, "best": best(row)}


def best(row: dict[str, Any]) -> dict[str, Any]:
    """The label of the least time in every table of times."""
    found = {}
    for what, times in row.items():
        if any(isinstance(t, dict) for t in times.values()):
            found[what] = best(times)
        elif numbers := {label: t for label, t in times.items() if not isinstance(t, str)}:
            found[what] = min(numbers, key=numbers.__getitem__)
    return found


def fused_tiles(Tile: Any) -> list[Any]:
    """Two blocks of the smaller ones share a multiprocessor: one's epilogue runs beside the other's product."""
    tiles = [
        Tile(128, 256, 64, 8, 4),
        Tile(128, 256, 64, 8, 3),
        Tile(256, 128, 64, 8, 4),
        Tile(128, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 128, 8, 3),
        Tile(64, 256, 64, 4, 2),
    ]
    return [*tiles, *(t._replace(copied=True) for t in tiles[:5])]


def sparse_tiles(Tile: Any) -> list[Any]:
    return [
        Tile(128, 128, 64, 64, 4, 3),
        Tile(128, 128, 64, 64, 4, 2),
        Tile(256, 128, 64, 64, 8, 3),
        Tile(256, 128, 64, 64, 8, 2),
        Tile(64, 128, 64, 64, 4, 4),
    ]


def profile(plan: Plan) -> dict[str, Any]:
    """Where the time goes: the kernels of one call, the longest first, in microseconds."""
    row = {}
    large, small_ = embeddings(plan, plan.large), embeddings(plan, plan.small[0])
    teachers, seed = teachers_of(plan, *plan.distill_large), torch.tensor(1, device=plan.device)
    pair = embeddings(plan, plan.distill_large[0])
    for name in plan.usable():
        distilled = functools.partial(fused_distillcse, teachers=teachers, temperature=TAU, seed=seed, backend=name)
        calls = {
            "focal": step_of(ours(name), *large),
            "symmetric": step_of(ours(name, symmetric=True), *large),
            "small": step_of(ours(name), *small_),
            "distill": step_of(lambda a, b, call=distilled: call(a, b).loss, *pair),  # type: ignore[misc]
        }
        for what, step in calls.items():
            step()
            activity = torch.profiler.ProfilerActivity
            with torch.profiler.profile(activities=[activity.CPU if plan.dry else activity.CUDA]) as seen:
                step()
                if not plan.dry:
                    torch.cuda.synchronize()
            events = [
                (e.key, e.count, e.cpu_time_total if plan.dry else e.device_time_total) for e in seen.key_averages()
            ]
            events = sorted(events, key=lambda e: -e[2])[:12]
            row[f"{what} {name}"] = [{"kernel": key[:120], "calls": n, "us": us} for key, n, us in events]
    return row


ROWS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "ceilings": ceilings,
    "focal": focal,
    "symmetric": functools.partial(focal, symmetric=True),
    "small": small,
    "distill small": lambda plan: distillation(plan, plan.distill_small, True),
    "distill large": lambda plan: distillation(plan, plan.distill_large, False),
    "layer": layer,
    **{f"peer {name}": functools.partial(parts.beside, name=name) for name in parts.PEERS},
    "profile": profile,
    "tune": tune,  # last: it tries what may not run
}


# --- the table ---


def best_of(values: dict[str, Any], of: Callable[[Any], float] = lambda v: v["median"]) -> float:
    return min(of(v) for v in values.values())


def table(plan: Plan, rows: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What the targets name: what, at least, aim, measured by the faster backend."""
    ours_in = lambda row, key: {n: row[key][n] for n in plan.usable()}  # noqa: E731
    ratio = lambda name: max(v["ratio"] for v in rows[f"peer {name}"]["sizes"].values() if isinstance(v, dict))  # noqa: E731
    K = plan.distill_small[1]
    lines: list[tuple[str, str, str, Callable[[], float | str]]] = [
        ("Focal, N = 65536, D = 768, one direction, ms", "34", "28", lambda: best_of(ours_in(rows["focal"], "ms"))),
        (
            "share of the three products' floor",
            "0.75",
            "0.90",
            lambda: max(rows["focal"]["share of the floor"].values()),
        ),
        ("symmetric, same size, ms", "45", "38", lambda: best_of(ours_in(rows["symmetric"], "ms"))),
        ("peak memory above inputs and gradients, MB", "1500", "600", lambda: min(rows["focal"]["peak MB"].values())),
        *(
            (f"B = {B}, D = 768, CUDA graph, µs", "60", "25", lambda B=B: best_of(ours_in(rows["small"][f"{B}"], "us")))
            for B in plan.small
        ),
        (
            f"DistillCSE, B = 64, {K} teachers, CUDA graph, µs",
            "150",
            "60",
            lambda: 1e3 * best_of(rows["distill small"]["ms"], lambda v: v["sample"]["median"]),
        ),
        (
            "DistillCSE, B = 16384, 4 teachers, sampled over none",
            "1.3",
            "1.1",
            lambda: min(rows["distill large"]["sample/none"].values()),
        ),
        (
            "block-sparse 75% (64²), over dense cuBLAS, times",
            "1.8",
            "2.8",
            lambda: max(v["linear"] for v in rows["layer"]["over dense"].values()),
        ),
        *(
            (f"times faster than {name}, at the size where most", least, aim, lambda name=name: ratio(name))
            for name, least, aim in (
                ("siglip-kernel", "1.3", "1.6"),
                ("memeff", "2", "3"),
                ("inf-cl", "5", "8"),
                ("eager", "2.5", "3.5"),
                ("compile", "-", "-"),
            )
        ),
    ]
    result = []
    for what, least, aim, value in lines:
        try:
            number = value()
            text = f"{number:.3g}" if isinstance(number, float) else "not measured"
        except (KeyError, ValueError, AttributeError, TypeError):  # the row, or this peer, was not run
            text = "not measured"
        result.append((what, least, aim, text))
    return result


def path_of(plan: Plan, out: Path) -> Path:
    return out / f"gpu-{'dry-run-' if plan.dry else ''}{date.today()}"


def write(plan: Plan, out: Path, rows: dict[str, Any]) -> None:
    """Both files anew after every row: what was measured stays if a later row is cut off, and what an earlier run
    measured."""
    stem = path_of(plan, out)
    device = (
        {} if plan.dry else {"name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    )
    about: dict[str, Any] = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": device,
    }
    about["missing"] = plan.missing()
    stem.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    title = (
        "Dry run on the processor: no number here means anything" if plan.dry else f"{device['name']}, {date.today()}"
    )
    lines = [f"# {title}", "", "| what | at least | aim | measured |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(line)} |" for line in table(plan, rows)]
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    lines += ["", *(f"- {name} failed: {error}" for name, error in failed.items())]
    lines += [f"- {name} missing: {reason}" for name, reason in about["missing"].items()]
    lines += [f"- fastest {what}: {label}" for what, label in rows.get("tune", {}).get("best", {}).items()]
    for name, row in rows.items():
        if "missing" in row:
            lines.append(f"- {name}: {row['missing']}")
        lines += [f"- {name}, {B} rows: {size}" for B, size in row.get("sizes", {}).items() if isinstance(size, str)]
    stem.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the processor")
    parser.add_argument("--exercise", action="store_true", help="each kernel once, nothing timed")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=240, help="no further row is begun after these")
    chosen = parser.parse_args()
    unknown = [name for name in chosen.only if not any(row.startswith(name) for row in ROWS)]
    if unknown:
        parser.error(f"--only {unknown[0]}: it may be one of {', '.join(ROWS)}, or how one begins")
    if not chosen.dry_run and not torch.cuda.is_available():
        print("No GPU is available to PyTorch: nothing can be measured here. --dry-run rehearses on the processor.")
        return 1
    torch.manual_seed(0)
    plan = Plan(chosen.dry_run)
    if chosen.exercise:
        return int(exercise(plan) > 0)
    chosen.out.mkdir(parents=True, exist_ok=True)
    stem = path_of(plan, chosen.out)
    rows: dict[str, Any] = {}
    if chosen.only and (earlier := stem.with_suffix(".json")).exists():
        rows = json.loads(earlier.read_text())["rows"]
    begin = time.perf_counter()
    write(plan, chosen.out, rows)
    for name, measure in ROWS.items():
        if chosen.only and not any(name.startswith(one) for one in chosen.only):
            continue
        start = time.perf_counter()
        if start - begin > chosen.seconds:
            rows[name] = {"error": f"not begun: {chosen.seconds:.0f} seconds were over"}
            continue
        try:
            rows[name] = measure(plan)
        except Exception as problem:
            traceback.print_exc()
            rows[name] = {"error": f"{type(problem).__name__}: {problem}"[:500]}
        rows[name]["seconds"] = round(time.perf_counter() - start, 1)
        try:
            plan.tidy()
        except RuntimeError as problem:  # the context is lost: every later row would fail
            rows[name].setdefault("error", f"{type(problem).__name__}: {problem}"[:500])
            break
        finally:
            write(plan, chosen.out, rows)
            print(f"{name}: {rows[name]['seconds']} s{', failed' if 'error' in rows[name] else ''}", flush=True)
    print(stem.with_suffix(".md").read_text())
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
