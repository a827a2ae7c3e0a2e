"""Sparse linear layers beside F.linear, and unstructured ones beside torch.sparse's CSR product.

    python -m benchmarks.sparse            about 5 minutes on 2 cores
    python -m benchmarks.sparse --short    one shape, forward only
    python -m benchmarks.sparse --json F   also writes the numbers to F

Every row first asserts parity with F.linear on the masked weight; times are minima of interleaved rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import arguments, interleaved, peak_memory, save
from pycse.sparse import SparseLinear

TOKENS = 2048
SHAPES = [(3072, 768), (768, 3072)]  # out, in: the two halves of BERT's feed-forward layer
CASES = [  # pattern, share of zeros
    ("block32", 0.75),
    ("block32", 0.9),
    ("block64", 0.75),
    ("block16", 0.75),
    ("unstructured", 0.9),
    ("unstructured", 0.95),
]
SIDE = {"block16": 16, "block32": 32, "block64": 64, "unstructured": 1}
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def layer(pattern: str, zeros: float, out: int, in_: int, dtype: torch.dtype) -> SparseLinear:
    b = SIDE[pattern]
    blocks = out // b * (in_ // b)
    kept = torch.zeros(blocks, dtype=torch.bool)
    kept[torch.randperm(blocks)[: round(blocks * (1 - zeros))]] = True
    mask = kept.view(out // b, in_ // b).repeat_interleave(b, 0).repeat_interleave(b, 1)
    return SparseLinear.from_dense(torch.nn.Linear(in_, out, dtype=dtype), mask, pattern)


def step(module: torch.nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward + backward, with the gradients of x, weight and bias."""
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = module.weight.grad = module.bias.grad = None  # type: ignore[union-attr]
        module(x).backward(dy)

    return run


def parity(sparse: SparseLinear, dense: torch.nn.Linear, x: Tensor, dy: Tensor) -> float:
    """The largest norm-wise difference among y and the gradients of x and the kept weights."""
    results = []
    for module in (sparse, dense):
        leaf = x.clone().requires_grad_()
        module.weight.grad = None
        y = module(leaf)
        y.backward(dy)
        assert module.weight.grad is not None and leaf.grad is not None
        results.append((y.detach(), leaf.grad, module.weight.grad * sparse.mask))
        module.weight.grad = None
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(*results))


def measure(
    pattern: str, zeros: float, out: int, in_: int, dtype: torch.dtype, tokens: int, short: bool
) -> dict[str, object]:
    torch.manual_seed(0)
    sparse = layer(pattern, zeros, out, in_, dtype)
    dense = sparse.densify()
    x, dy = torch.randn(tokens, in_, dtype=dtype), torch.randn(tokens, out, dtype=dtype)
    off = parity(sparse, dense, x, dy)
    assert off < LIMIT[dtype], f"{pattern}, {zeros:.0%} zero, {out} x {in_}: off by {off:.1e} from F.linear"

    def forward(module: torch.nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return module(x)

        return run

    calls: dict[str, Callable[[], object]] = {"dense": forward(dense), "sparse": forward(sparse)}
    if pattern == "unstructured" and dtype == torch.float32:
        csr, bias = dense.weight.detach().to_sparse_csr(), dense.bias.detach()
        calls["csr"] = lambda: (csr @ x.t()).t() + bias
    t = interleaved(calls, 2.0 if short else 8.0)
    work = 2 * tokens * out * in_
    row: dict[str, object] = {
        "pattern": pattern,
        "zeros": zeros,
        "shape": f"{in_} -> {out}",
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "parity": off,
        "dense GF/s": work / t["dense"].best / 1e9,
        "sparse GF/s": work * sparse.density / t["sparse"].best / 1e9,
        "forward": t["dense"].best / t["sparse"].best,
        "spread": max(t["dense"].spread, t["sparse"].spread),
    }
    if "csr" in t:
        row["against CSR"] = t["csr"].best / t["sparse"].best
    if not short:
        both = interleaved({"dense": step(dense, x, dy), "sparse": step(sparse, x, dy)}, 8.0)
        row["forward + backward"] = both["dense"].best / both["sparse"].best
        row["memory MB"] = peak_memory(forward(sparse)) / 1e6
    return row


def main() -> None:
    chosen = arguments(__doc__, "one shape, forward only")
    print(
        "| pattern | zero | layer | dtype | tokens | parity | forward | forward + backward | against CSR "
        "| GF/s (dense) | memory MB | spread |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    todo = [(*case, *shape, torch.float32, TOKENS) for shape in SHAPES for case in CASES]
    if chosen.short:
        todo = todo[: len(CASES)]
    else:
        todo += [(*case, *SHAPES[0], torch.bfloat16, TOKENS) for case in CASES if case[1] == 0.9]
        todo += [(*case, *SHAPES[0], torch.float32, 32) for case in CASES if case[1] == 0.9]
    rows = []
    for case in todo:
        r = measure(*case, chosen.short)
        rows.append(r)
        ratio = lambda name: f"{r[name]:.2f}x" if name in r else ""  # noqa: E731, B023
        memory = f"{r['memory MB']:.0f}" if "memory MB" in r else ""
        print(
            f"| {r['pattern']} | {r['zeros']:.0%} | {r['shape']} | {r['dtype']} | {r['tokens']} | {r['parity']:.0e} "
            f"| {ratio('forward')} | {ratio('forward + backward')} | {ratio('against CSR')} "
            f"| {r['sparse GF/s']:.0f} ({r['dense GF/s']:.0f}) | {memory} | {r['spread']:.0%} |",
            flush=True,
        )
    save(chosen.json, rows=rows)


if __name__ == "__main__":
    main()
