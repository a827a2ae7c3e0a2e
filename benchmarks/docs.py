"""The measured parts of README.md and docs/performance.md, made from a results file.

A part stands between ``<!-- bench NAME -->`` and ``<!-- end -->``; ``PARTS`` says how it is made.
tests/benchmarks/test_benchmarks.py holds the documents against the newest results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.baseline import TOLERANCE
from benchmarks.growth import LARGE, NEAR, SMALL, curves
from benchmarks.workloads import select
from pycse.training.errors import UserError

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/performance.md")
MARK = re.compile(r"(<!-- bench ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Results = dict[str, Any]


def newest(folder: Path) -> Path:
    files = sorted(folder.glob("cpu-*.json"))
    if not files:
        raise UserError(f"{folder} has no cpu-*.json; make bench writes one")
    return files[-1]


def load(path: Path) -> Results:
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is no JSON file that can be read") from None
    if not isinstance(results, dict) or results.get("schema") != 1:
        raise UserError(f"{path} is of another schema than 1; make bench writes a new one")
    return results | {"stem": path.stem}


def render(text: str, results: Results) -> str:
    def part(match: re.Match[str]) -> str:
        if match[2] not in PARTS:
            raise UserError(f"no part is called {match[2]!r}; there are {', '.join(PARTS)}")
        return f"{match[1]}{PARTS[match[2]](results)}\n{match[3]}"

    return MARK.sub(part, text)


def write(path: Path) -> list[Path]:
    """The documents that changed."""
    results, changed = load(path), []
    for name in DOCUMENTS:
        document = ROOT / name
        before = document.read_text()
        if (after := render(before, results)) != before:
            document.write_text(after)
            changed.append(document)
    return changed


def markdown(header: str, rows: Iterable[Iterable[str]]) -> str:
    columns = header.split(" | ")
    lines = [f"| {header} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


# --- numbers


class Row:
    """A workload's numbers as text; what was not measured is a dash."""

    def __init__(self, results: Results, name: str, raised: bool = False) -> None:
        self.row: dict[str, Any] = results["raised" if raised else "rows"].get(name, {})

    def _text(self, value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def ratio(self, peer: str, form: str = ".2f") -> str:
        return self._text(self.row.get("ratios", {}).get(peer), form)

    def over(self, peer: str) -> str:
        """pycse's time over the peer's."""
        value = self.row.get("ratios", {}).get(peer)
        return self._text(None if value is None else 1 / value, ".2f")

    @property
    def ms(self) -> str:
        value = self.row.get("seconds", {}).get("pycse", 0) * 1e3
        return self._text(value or None, ".3f" if value < 10 else ".1f" if value < 1000 else ".0f")

    @property
    def parity(self) -> str:
        return self._text(self.row.get("parity", {}).get("pycse"), ".0e")

    @property
    def spread(self) -> str:
        return self._text(self.row.get("spread"), ".0%")

    @property
    def share(self) -> str:
        return self._text(self.row.get("share"), ".3f")

    @property
    def percent(self) -> str:
        return self._text(self.row.get("share"), ".0%")

    @property
    def floor(self) -> str:
        """The fastest floor's panel rows, beside the share."""
        floors = {name: r for name, r in self.row.get("ratios", {}).items() if name.startswith("floor-")}
        fastest = min(floors, key=floors.__getitem__, default="")
        return f"{self.share} ({fastest.removeprefix('floor-')})" if floors else "–"

    def cells(self, *columns: str) -> list[str]:
        """Properties of this class by name, and ratios by peer."""
        return [getattr(self, name) if hasattr(Row, name) else self.ratio(name) for name in columns]

    def megabytes(self, peer: str = "pycse") -> str:
        value = self.row.get("memory", {}).get(peer)
        return self._text(None if value is None else value / 1e6, ".0f")

    def relative(self, peer: str, other: str) -> str:
        """One peer's time over another's."""
        r = self.row.get("ratios", {})
        return self._text(r[peer] / r[other] if peer in r and other in r else None, ".2f")


LARGE_SIZES = ("8192x768-fp32", "8192x384-fp32", "8192x768-bf16")


def focal(*shapes: str, raised: bool = False) -> Callable[[Results], str]:
    def table(results: Results) -> str:
        rows = []
        for shape in shapes:
            r = Row(results, f"focal-{shape}", raised)
            first = [shape, r.parity, r.ms, r.ratio("floor-512", ".3f")]
            rows.append([*first, *r.cells("floor", "eager", "compile", "spread")])
        return markdown("N x D, dtype | parity | ms | floor-512 | fastest floor | eager | compile | spread", rows)

    return table


def focal_targets(results: Results) -> str:
    plain = [Row(results, f"focal-{shape}") for shape in LARGE_SIZES]
    raised = [Row(results, f"focal-{shape}", True) for shape in LARGE_SIZES]
    share = lambda k: f"{plain[k].ratio('floor-512', '.3f')}; {raised[k].ratio('floor-512', '.3f')}"  # noqa: E731
    each = lambda rows, peer: ", ".join(r.ratio(peer) for r in rows)  # noqa: E731
    rows = [
        ["fp32, N = 8192, D = 768: share of floor-512, as it comes; raised", "0.96", "1.04", share(0)],
        ["same, D = 384", "0.95", "1.03", share(1)],
        ["bf16, D = 768", "0.93", "0.97", share(2)],
        ["the three against eager, allocator as it comes", "2, 2.5, 1.8", "3, 4, 2.5", each(plain, "eager")],
        ["the three against eager, thresholds raised", "1.2, 1.35, 1.25", "1.3, 1.45, 1.4", each(raised, "eager")],
        ["the three against torch.compile, thresholds raised", "1.0", "1.1", each(raised, "compile")],
        ["B = 64, D = 768, fp32, against eager", "2.2", "3", Row(results, "focal-64x768-fp32").ratio("eager")],
        ["B = 512", "1.3", "1.5", Row(results, "focal-512x768-fp32").ratio("eager")],
        [
            "peak memory, N = 32768, D = 768, MB",
            "< 96",
            "< 48",
            Row(results, "focal-32768x768-fp32").megabytes(),
        ],
        ["import pycse beyond torch, s", "< 0.3", "< 0.1", f"{results['import seconds']:.3f}"],
    ]
    return markdown("what | at least | aim | measured", rows)


def peers(results: Results) -> str:
    """Every peer of the one- and two-directional losses, forward + backward."""
    names = ("eager", "compile", "linear-ce", "mnrl", "cached-mnrl", "ntxent", "clip")
    rows = []
    for op in ("infonce", "symmetric"):
        for N, dtype in ((64, "fp32"), (512, "fp32"), (4096, "fp32"), (4096, "bf16")):
            r = Row(results, f"{op}-{N}x768-{dtype}")
            if r.row or dtype == "fp32":
                rows.append([op, f"{N}, {dtype}", *r.cells("parity", "ms", "floor", *names, "spread")])
    return markdown(f"loss | N, dtype | parity | ms | fastest floor | {' | '.join(names)} | spread", rows)


def forward(results: Results) -> str:
    rows = []
    for shape in ("512x768-fp32", "8192x768-fp32"):
        r = Row(results, f"focal-{shape}-forward")
        rows.append([shape, *r.cells("parity", "ms", "floor", "eager", "spread")])
    return markdown("N x D, dtype | parity | ms | fastest floor | eager | spread", rows)


def growth(results: Results) -> str:
    curve = curves(results["rows"])
    rows = []
    for N, seconds in curve["seconds"]["pycse"].items():
        r = Row(results, f"focal-{N}x768-fp32")
        rows.append(
            [
                str(N),
                f"{seconds * 1e3:{'.2f' if seconds < 0.1 else ',.0f'}}",
                r.share,
                r.ratio("eager"),
                r.megabytes(),
                r.megabytes("eager"),
            ]
        )
    form = lambda p: "–" if p is None else f"{p:.2f}"  # noqa: E731
    of = curve["exponents"]
    fits = [
        [what, *(form(of[key].get(name)) for name in ("pycse", "floor", "eager"))]
        for what, key in (
            (f"time, N ≤ {SMALL}", "time small"),
            (f"time, N ≥ {LARGE}", "time large"),
            (f"memory, N ≥ {LARGE}", "memory"),
        )
    ]
    said = f"Nowhere is pycse within {NEAR:.0%} of its floor."
    if near := curve["near floor"]:
        said = f"Within {NEAR:.0%} of its floor from N = {near[0]}, below which the overhead of a call decides"
        beyond = near[1] < max(curve["shares"])
        said += f", to {near[1]}, beyond which panels of few rows do, the price of little memory." if beyond else "."
    return "\n\n".join(
        [
            markdown("N | ms | share of the floor | eager | MB | MB of eager", rows),
            markdown("exponent of N | pycse | its floor | eager", fits),
            said,
            f"![Time and memory over N](../benchmarks/results/{results['stem']}-growth.png)",
        ]
    )


def distill(results: Results) -> str:
    rows = []
    for N, K in ((64, 1), (64, 16), (512, 4), (4096, 4)):
        r = Row(results, f"distillcse-{N}x768-fp32-{K}-sample")
        cells = [str(N), str(K), r.parity, r.ms, r.ratio("eager"), r.share, r.over("pycse-none")]
        rows.append([*cells, r.relative("pycse-expected", "pycse-none"), r.ratio("distill-clip"), r.spread])
    memory = Row(results, "distillcse-16384x768-fp32-4-sample").megabytes()
    header = (
        "B | teachers | parity | ms | eager | share of the floor | sample/none | expected/none | distill-clip* | spread"
    )
    return markdown(header, rows) + f"\n\nPeak memory above inputs and gradients, B = 16384, 4 teachers: {memory} MB."


def distill_targets(results: Results) -> str:
    row = lambda N, K: Row(results, f"distillcse-{N}x768-fp32-{K}-sample")  # noqa: E731
    rows = [
        ["B = 64, 1 teacher, against eager", "2.5", "3.3", row(64, 1).ratio("eager")],
        ["B = 64, 16 teachers", "2", "2.6", row(64, 16).ratio("eager")],
        ["B = 512, 4 teachers", "1.6", "1.75", row(512, 4).ratio("eager")],
        ["B = 4096, 4 teachers: sampled over no shuffle", "1.3", "1.1", row(4096, 4).over("pycse-none")],
        ["B = 4096, 4 teachers, sampled: share of the floor", "0.80", "0.90", row(4096, 4).share],
        ["B = 16384, 4 teachers: memory, MB", "< 400", "< 128", row(16384, 4).megabytes()],
    ]
    return markdown("what | at least | aim | measured", rows)


def uniformity(results: Results) -> str:
    rows = []
    for N, raised in ((512, False), (2048, False), (8192, False), (8192, True)):
        r = Row(results, f"uniformity-{N}x768-fp32", raised)
        rows.append([f"{N}{', raised' * raised}", r.parity, r.ms, r.ratio("eager"), r.floor, r.spread])
    memory = Row(results, "uniformity-32768x768-fp32").megabytes()
    table = markdown("N | parity | ms | eager | fastest floor | spread", rows)
    return (
        f"{table}\n\nPeak memory above input and gradient, N = 32768: {memory} MB, where the pairs alone take 4295 MB."
    )


def sparse(results: Results) -> str:
    rows = []
    for w in select("default", "sparse-*-forward"):
        one, both = Row(results, w.name), Row(results, w.name.removesuffix("-forward"))
        what = [f"{w.pattern}, {w.zeros}%", f"{w.N} x {w.D} x {w.out}", w.dtype, both.parity]
        other = "csr" if w.pattern == "unstructured" else "bsr"
        rows.append([*what, one.ratio("eager"), both.ratio("eager"), *one.cells("share", other, "spread")])
    columns = "forward | forward + backward | share of the limit | CSR or BSR | spread"
    return markdown(f"pattern, zeros | tokens x in x out | dtype | parity | {columns}", rows)


def sparse_targets(results: Results) -> str:
    def both(pattern: str, suffix: str = "-forward", peer: str = "eager") -> str:
        names = (f"sparse-{pattern}-2048x{shape}-fp32{suffix}" for shape in ("768x3072", "3072x768"))
        return ", ".join(Row(results, name).ratio(peer) for name in names)

    rows = [
        ["block 32, 75% zero, forward", "3.4", "3.9", both("block32-75")],
        ["block 32, 90% zero, forward", "7", "9", both("block32-90")],
        ["block 32, 75% zero, forward + backward", "2.8", "3.5", both("block32-75", "")],
        ["single weights, 90% zero, forward", "4", "5.5", both("unstructured-90")],
        ["single weights, 95% zero, forward", "6", "9", both("unstructured-95")],
        ["single weights, 90% zero, against torch.sparse CSR", "2", "4", both("unstructured-90", peer="csr")],
    ]
    return markdown("what, x 2048 × 768 (and × 3072), fp32 | at least | aim | measured", rows)


def row_kernels(results: Results) -> str:
    rows = []
    for name in ("contrastive-rows-8192x768-fp32", "contrastive-rows-8192x768-bf16") + tuple(
        f"distill-rows-4096x768-fp32-{shuffle}" for shuffle in ("none", "expected", "sample")
    ):
        r = Row(results, name)
        rows.append([name, r.parity, r.ms, r.ratio("yardstick", ".3f"), r.spread])
    return markdown("row kernel, 32 rows, one thread | parity | ms | yardstick/kernel | spread", rows)


def profile_table(results: Results, N: str) -> str:
    stages = results.get("profile", {}).get(N, {})
    total = stages.get("total", 1.0)
    rows = [[name, f"{s * 1e6:.1f}", f"{s / total:.1%}"] for name, s in sorted(stages.items(), key=lambda x: -x[1])]
    return markdown(f"stage, N = {N} | µs | share", rows)


def profiles(results: Results) -> str:
    return f"{profile_table(results, '64')}\n\n{profile_table(results, '8192')}"


def measured(results: Results) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in {**results["missing"], **results["skipped"]}.items():
        reasons.setdefault(reason, []).append(name)
    left_out = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    text = f"Measured {results['date']}, commit {results['commit']}: {results['machine']}."
    return text + (f" Left out: {left_out}." if left_out else "")


def tolerance(results: Results) -> str:
    return f"Tolerance: a ratio may be {TOLERANCE:.0%} smaller than its baseline."


# --- README.md


def readme_measured(results: Results) -> str:
    return f"{results['date']}, {results['machine']}:"


def readme_speed(results: Results) -> str:
    rows = []
    for N, D, dtype in (
        (64, 768, "fp32"),
        (512, 768, "fp32"),
        (8192, 768, "fp32"),
        (8192, 384, "fp32"),
        (8192, 768, "bf16"),
    ):
        plain, raised = (Row(results, f"focal-{N}x{D}-{dtype}", r) for r in (False, True))
        against = (
            f"{plain.ratio(p)} / {raised.ratio(p)}" if N == 8192 else plain.ratio(p) for p in ("eager", "compile")
        )
        rows.append([str(N), str(D), dtype, *against, plain.percent])
    header = "N | D | dtype | times eager PyTorch | times torch.compile | speed against PyTorch's products alone"
    return markdown(header, rows)


def readme_picture(results: Results) -> str:
    return f"![Time and memory over N](benchmarks/results/{results['stem']}-growth.png)"


def other(results: Results) -> str:
    distilled = [
        Row(results, f"distillcse-{N}x768-fp32-{K}-sample") for N, K in ((64, 1), (64, 16), (512, 4), (4096, 4))
    ]
    u = [Row(results, "uniformity-8192x768-fp32", r) for r in (False, True)]
    layers = [
        Row(results, f"sparse-{p}-2048x768x3072-fp32-forward") for p in ("block32-75", "block32-90", "unstructured-90")
    ]
    rows = [
        [
            "DistillCSE, Group-P sampled: B = 64 and 1 teacher, 64 and 16, 512 and 4, 4096 and 4",
            ", ".join(r.ratio("eager", ".1f") for r in distilled),
        ],
        ["uniformity, N = 8192", " / ".join(r.ratio("eager") for r in u)],
        [
            "`SparseLinear` 768 → 3072 against `nn.Linear`, 2048 tokens: blocks of 32, 75% and 90% zero; "
            "single weights, 90% zero",
            f"{layers[0].ratio('eager', '.1f')}, {layers[1].ratio('eager', '.1f')}; {layers[2].ratio('eager', '.1f')}",
        ],
    ]
    return markdown("other, fp32, D = 768 | times eager PyTorch", rows)


def memory(results: Results) -> str:
    peak = Row(results, "focal-32768x768-fp32").megabytes()
    return f"Memory beyond inputs and gradients at N = 32768, D = 768: {peak} MB; one N×N matrix takes 4.3 GB."


PARTS: dict[str, Callable[[Results], str]] = {
    "measured": measured,
    "small": focal("64x768-fp32", "128x768-fp32", "512x768-fp32", "64x768-bf16", "512x768-bf16"),
    "large": focal(*LARGE_SIZES),
    "large-raised": focal(*LARGE_SIZES, raised=True),
    "focal-targets": focal_targets,
    "forward": forward,
    "peers": peers,
    "growth": growth,
    "distill": distill,
    "distill-targets": distill_targets,
    "uniformity": uniformity,
    "sparse": sparse,
    "sparse-targets": sparse_targets,
    "rows": row_kernels,
    "profile": profiles,
    "tolerance": tolerance,
    "readme-measured": readme_measured,
    "readme-speed": readme_speed,
    "readme-picture": readme_picture,
    "other": other,
    "memory": memory,
}
