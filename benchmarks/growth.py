"""How cost grows with N: fitted exponents, where small-batch overhead ends, and the pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.workloads import WORKLOADS

NEAR = 0.9  # of the floor: from there on the products decide
LARGE, SMALL = 2048, 1024  # exponents are fitted from LARGE on, and up to SMALL


def exponent(points: dict[int, float]) -> float | None:
    """p of the least-squares fit log y = p log N + const, None for fewer than two points."""
    xs, ys = [math.log(N) for N in points], [math.log(max(y, 1e-12)) for y in points.values()]
    if len(points) < 2:
        return None
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def near_floor(shares: dict[int, float]) -> tuple[int, int] | None:
    """The smallest and largest N of the longest stretch within NEAR of the floor."""
    stretches: list[list[int]] = [[]]
    for N in sorted(shares):
        if shares[N] >= NEAR:
            stretches[-1].append(N)
        else:
            stretches.append([])
    longest = max(stretches, key=len)
    return (longest[0], longest[-1]) if longest else None


def curves(rows: dict[str, Any]) -> dict[str, Any]:
    """Of the workloads that make the curve: seconds and bytes by N for pycse, eager and the floor, and what they
    say."""
    points = sorted((w for w in WORKLOADS if w.growth and w.name in rows), key=lambda w: w.N)
    seconds: dict[str, dict[int, float]] = {"pycse": {}, "eager": {}, "floor": {}}
    memory: dict[str, dict[int, float]] = {"pycse": {}, "eager": {}}
    shares: dict[int, float] = {}
    for w in points:
        row = rows[w.name]
        best = row["best"]
        floors = [value for name, value in best.items() if name.startswith("floor")]
        for name, value in (
            ("pycse", best["pycse"]),
            ("eager", best.get("eager")),
            ("floor", min(floors, default=None)),
        ):
            if value is not None:
                seconds[name][w.N] = value
        for name in memory:
            if row.get("memory", {}).get(name):
                memory[name][w.N] = row["memory"][name]
        if row["share"] is not None:
            shares[w.N] = row["share"]
    large = lambda curve: {N: y for N, y in curve.items() if N >= LARGE}  # noqa: E731
    small = lambda curve: {N: y for N, y in curve.items() if N <= SMALL}  # noqa: E731
    return {
        "seconds": seconds,
        "memory": memory,
        "shares": shares,
        "exponents": {
            "time small": {name: exponent(small(curve)) for name, curve in seconds.items()},
            "time large": {name: exponent(large(curve)) for name, curve in seconds.items()},
            "memory": {name: exponent(large(curve)) for name, curve in memory.items()},
        },
        "near floor": near_floor(shares),
    }


def pictures(results: dict[str, Any], stem: Path) -> list[Path]:
    """``stem``-growth.png and ``stem``-share.png."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    grown = curves(results["rows"])
    colours = {"pycse": "tab:blue", "eager": "tab:orange", "floor": "tab:gray"}
    figure = Figure(figsize=(10, 4), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for axes, of, fits, unit in (
        (time, grown["seconds"], grown["exponents"]["time large"], 1.0),
        (memory, grown["memory"], grown["exponents"]["memory"], 1e6),
    ):
        for name, curve in of.items():
            if curve:
                p = fits[name]
                label = name if p is None else f"{name}, N^{p:.2f}"
                axes.loglog(
                    list(curve), [y / unit for y in curve.values()], "o-", color=colours[name], label=label, ms=4
                )
        axes.set_xlabel("N")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
    time.set_title("seconds, forward + backward")
    memory.set_title("peak MB beyond inputs and gradients")
    for N in grown["near floor"] or ():
        time.axvline(N, color="tab:gray", linestyle=":")
    figure.suptitle(f"Focal-InfoNCE, D = 768, float32; exponents from N = {LARGE} on")

    shares = {name: row["share"] for name, row in results["rows"].items() if row.get("share") is not None}
    bars = Figure(figsize=(9, 0.8 + 0.2 * len(shares)), layout="constrained")
    axes = bars.subplots()
    drawn = axes.barh(list(shares), list(shares.values()), color="tab:blue")
    axes.bar_label(drawn, [f"{share:.2f}" for share in shares.values()], padding=2, fontsize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, max(1.25, 1.1 * max(shares.values(), default=0)))
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    bars.suptitle(
        "share of the limit: the fastest floor; the yardstick of row kernels; a dense layer's kept part", fontsize=9
    )
    written = [stem.with_name(f"{stem.name}-{what}.png") for what in ("growth", "share")]
    for picture, path in zip((figure, bars), written):
        picture.savefig(path, dpi=110)
    return written
