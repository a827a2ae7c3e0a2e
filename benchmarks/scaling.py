"""What losses over processes cost, by formulas: memory, bytes and operations of a rank; and those bytes counted.

B rows a rank, N = W B keys of D features, e bytes a feature, a = 4 bytes a sum:

              memory                                  bytes received, and sent    operations
    gather    N D (e + a), in 16 bits N D (2 e + a)   (N - B) D (e + a)           6 B N D
    ring      2 B D (e + a)                           (N - B) D (2 e + a)         8 B N D

docs/scaling.md explains them. Its tables stand between the marks of benchmarks/docs.py, and ``write`` makes them anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.collectives import Call, Watch, together
from benchmarks.docs import MARK, markdown

DOCUMENT = Path(__file__).parents[1] / "docs/scaling.md"
EXCHANGES = ("gather", "ring")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SUM = 4  # bytes of a sum of gradients

# --- the model. Nothing of it is measured.

WIDTH = 768
MEMORY = 80e9  # bytes of a GPU
BANDWIDTH = 50e9  # bytes a second through a rank's network, each way (400 Gbit/s)
RATE = {"bf16": 400e12, "fp32": 40e12}  # operations a second of a rank
# An encoder of BERT's base size, two texts a row: 6 operations a parameter and token, forward and backward.
PARAMETERS, TOKENS = 110e6, 64
ENCODER = 6 * PARAMETERS * TOKENS * 2  # operations a row
SHARE = 0.08  # of the encoder's seconds, above which the loss counts
SIZES = (
    (1, 1 << 15), (8, 1 << 15), (8, 1 << 18), (64, 1 << 18), (64, 1 << 20), (256, 1 << 20), (256, 1 << 22),
    (1024, 1 << 22), (1024, 1 << 24),
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of a rank and step."""

    memory: float  # bytes of keys and their gradients, at the most
    network: float  # bytes received, and as many sent
    operations: float  # of the products


def cost(exchange: str, W: int, N: int, D: int, dtype: str) -> Cost:
    """One direction, forward and backward, N / W rows on each of W ranks."""
    B, e, a = N / W, DTYPES[dtype].itemsize, SUM
    if exchange == "ring":
        return Cost(B * D * (3 * e + 5 * a), (N - B) * D * (2 * e + a), 8 * B * N * D)
    rounded = e if e < a else 0  # a gradient as autograd hands it on, beside its sum
    return Cost(N * D * (e + a + rounded), (N - B) * D * (e + a), 6 * B * N * D)


def number(n: float) -> str:
    """With three digits, and powers of two as people say them."""
    if n >= 1 << 20:
        return f"{n / (1 << 20):.3g} M"
    return f"{n / 1024:.3g} k" if n >= 1024 else f"{n:.3g}"


def model(dtype: str) -> Callable[[], str]:
    def part() -> str:
        rows = []
        for W, N in SIZES:
            cells = [str(W), number(N), number(N / W)]
            for exchange in EXCHANGES:
                c = cost(exchange, W, N, WIDTH, dtype)
                seconds = (c.network / BANDWIDTH, c.operations / RATE[dtype])
                cells += [f"{c.memory / 1e9:.3g}", f"{c.network / 1e9:.3g}", *(f"{s:.2g}" for s in seconds)]
            rows.append(cells)
        columns = [f"{x}: {c}" for x in EXCHANGES for c in ("memory, GB", "network, GB", "network, s", "products, s")]
        return markdown(" | ".join(["ranks", "keys N", "rows a rank", *columns]), rows)

    return part


def limits() -> str:
    """Sizes at which something begins to count. Per key, or per rank and row: from one row on each of many ranks."""
    ONE = 1 << 20
    per_key = {(x, d): cost(x, ONE, ONE, WIDTH, d) for x in EXCHANGES for d in DTYPES}  # one row a rank

    def row(what: str, formula: str, size: Callable[[str, str, Cost], float | None]) -> list[str]:
        found = [size(x, d, per_key[x, d]) for x in EXCHANGES for d in DTYPES]
        return [what, formula, *("–" if n is None else number(n) for n in found)]

    def full(x: str, d: str, c: Cost) -> float | None:
        return None if x == "ring" else MEMORY / 2 / (c.memory / ONE)

    def as_long(x: str, d: str, c: Cost) -> float:
        return (c.network / BANDWIDTH) / (c.operations / RATE[d])

    def network(x: str, d: str, c: Cost) -> float:
        return SHARE * (ENCODER / RATE[d]) / (c.network / ONE / BANDWIDTH)

    def products(x: str, d: str, c: Cost) -> float:
        return SHARE * ENCODER / (c.operations / ONE)

    columns = " | ".join(f"{x}, {d}" for x in EXCHANGES for d in DTYPES)
    return markdown(
        f"what | formula (gather) | {columns}",
        [
            row("keys N that fill half of a GPU's memory", "M / 2 D (2 e + a) in 16 bits", full),
            row("ranks W where the network takes 8% of the encoder's time", "0.08 E n / r D (e + a)", network),
            row("keys N where products take 8% of the encoder's time", "0.08 E / 6 D", products),
            row("rows a rank where network and products take as long", "r (e + a) / 6 n", as_long),
        ],
    )


def assumed() -> str:
    rates = " and ".join(f"{rate / 1e12:.0f}·10¹² in {dtype}" for dtype, rate in RATE.items())
    return "\n".join(
        [
            f"Assumed, not measured: D = {WIDTH}; M = {MEMORY / 1e9:.0f} GB of a GPU; n = {BANDWIDTH / 1e9:.0f} GB/s "
            "through a rank's network in each direction, the same between any",
            f"two ranks; r = {rates} operations a second; an encoder of {PARAMETERS / 1e6:.0f} million parameters that",
            f"reads two texts of {TOKENS} tokens a row, E = 6 · parameters · tokens = {ENCODER / 1e9:.1f}·10⁹. No "
            "latency, and nothing at the same time: seconds of network",
            "and products add up. In the tables k is 2¹⁰ and M 2²⁰ rows, GB are 10⁹ bytes.",
        ]
    )


# --- the same, counted

ROWS, FEATURES, TEACHER = 64, 16, 8
Bytes = dict[str, int]  # by what the collective is for
CALLS = ("InfoNCE", "InfoNCE with ids", "symmetric", "SupCon", "DistillCSE", "uniformity", "alignment")


def bytes_of(call: str, W: int, e: int) -> Bytes:
    """By formula, on W ranks."""
    matrix, ids = W * ROWS * FEATURES, W * ROWS * 8
    gathered = {
        "InfoNCE": matrix * e, "InfoNCE with ids": matrix * e + ids, "symmetric": 2 * matrix * e,
        "SupCon": matrix * e + ids, "DistillCSE": (2 * matrix + W * ROWS * TEACHER) * e, "uniformity": matrix * e,
    }  # fmt: skip
    result = {"headers": W * 6 * 8}
    if call == "alignment":
        return result
    if call == "uniformity":
        return result | {"keys": gathered[call], "sums": W * 8, "upstream gradients": 8}
    sides = 2 if call in ("symmetric", "DistillCSE") else 1
    return result | {"keys": gathered[call], "gradients": sides * matrix * SUM}


def called(rank: int, call: str, dtype: str) -> list[Call]:
    """The collectives of one call, forward and backward."""
    import pycse

    g = torch.Generator().manual_seed(rank)
    x, y, e = (torch.randn(ROWS, n, generator=g).to(DTYPES[dtype]) for n in (FEATURES, FEATURES, TEACHER))
    x.requires_grad_()
    y.requires_grad_()
    ids, how = torch.arange(ROWS, dtype=torch.int64, device="cpu"), {"group": dist.group.WORLD}
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "InfoNCE": lambda: pycse.fused_infonce(x, y, **how),
        "InfoNCE with ids": lambda: pycse.fused_infonce(x, y, query_ids=ids, key_ids=ids, **how),
        "symmetric": lambda: pycse.fused_infonce(x, y, symmetric=True, **how),
        "SupCon": lambda: pycse.fused_supcon(x, ids, **how),
        "DistillCSE": lambda: pycse.fused_distillcse(x, y, [e], **how).loss,
        "uniformity": lambda: pycse.uniformity(x, **how),
        "alignment": lambda: pycse.alignment(x, y, **how),
    }
    with Watch() as watch:
        calls[call]().backward()
    return watch.calls


def of_all(rank: int) -> list[tuple[str, str, list[Call]]]:
    return [(call, dtype, called(rank, call, dtype)) for call in CALLS for dtype in DTYPES]


def counted(sizes: tuple[int, ...] = (1, 2, 3, 4)) -> str:
    """Real runs on so many processes; raises where a rank's bytes are not the formula's."""
    cells: dict[tuple[str, str], list[str]] = {}
    for W in sizes:
        for rank, found in enumerate(together(W, 1, of_all)):
            for call, dtype, calls in found:
                said, right = {c.what: c.bytes for c in calls}, bytes_of(call, W, DTYPES[dtype].itemsize)
                if said != right or len(said) != len(calls):
                    raise AssertionError(f"{call}, {dtype}, rank {rank} of {W}: {calls} where the formula says {right}")
                if rank == 0:
                    cells.setdefault((call, dtype), []).append(" + ".join(map(str, said.values())))
    rows = [[call, dtype, *found] for (call, dtype), found in cells.items()]
    return markdown(" | ".join(["call", "dtype", *(f"W = {W}" for W in sizes)]), rows)


PARTS: dict[str, Callable[[], str]] = {
    "assumed": assumed,
    "limits": limits,
    **{f"model-{dtype}": model(dtype) for dtype in DTYPES},
    "counted": counted,
}


def render(text: str, parts: dict[str, Callable[[], str]]) -> str:
    """The document with these parts made anew; others stay."""

    def part(match: re.Match[str]) -> str:
        return f"{match[1]}{parts[match[2]]()}\n{match[3]}" if match[2] in parts else match[0]

    return MARK.sub(part, text)


def write() -> bool:
    """Whether the document changed."""
    before = DOCUMENT.read_text()
    after = render(before, PARTS)
    DOCUMENT.write_text(after)
    return after != before
