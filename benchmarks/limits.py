"""The limits: a workload's own matrix products with nothing between them, and a yardstick for row kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.workloads import Inputs, Workload


def products(w: Workload, x: Inputs, c: int, wide: bool = False) -> Callable[[], None]:
    """In panels of c rows, with torch.mm into preallocated memory. 6 N^2 D operations for a contrastive loss, 8 where
    it is symmetric, 2 forward alone; 24 for four directions; 3 for uniformity, whose panels are triangular; 8 and
    6 + 2 K for DistillCSE with K teachers. ``wide``: a product of 16-bit panels adds to the float32 sum itself,
    which PyTorch can on CUDA."""
    z = [leaf.detach() for leaf in x.leaves]
    N, D = z[0].shape
    new = lambda *shape, dtype=z[0].dtype: torch.empty(*shape, dtype=dtype, device=z[0].device)  # noqa: E731
    S, g1, g2 = new(c * N), new(N, D), torch.zeros(N, D, device=z[0].device)
    product = new(N, D) if w.dtype == "bf16" and not wide else None

    def accumulate(G: Tensor, panel: Tensor, into: Tensor) -> None:
        if wide:
            torch.addmm(into, G.t(), panel, out_dtype=torch.float32, out=into)
        elif product is None:
            into.addmm_(G.t(), panel)
        else:  # a 16-bit accumulator would lose the sum
            into.add_(torch.mm(G.t(), panel, out=product[: len(into)]))

    if wide:  # raises here where this PyTorch cannot
        accumulate(new(16, 16), new(16, 16), torch.zeros(16, 16, device=z[0].device))

    def contrastive() -> None:
        z1, z2 = z
        for sweep in range(2 if w.op == "symmetric" and w.backward else 1):
            for i in range(0, N, c):
                panel = z1[i : i + c]
                s = torch.mm(panel, z2.t(), out=S.view(c, N)[: len(panel)])
                if w.backward and (w.op != "symmetric" or sweep):
                    torch.mm(s, z2, out=g1[i : i + c])
                    accumulate(s, panel, g2)

    def distillcse() -> None:
        z1, z2 = z
        for i in range(0, N, c):
            panel = z1[i : i + c]
            s, t = (m.view(c, N)[: len(panel)] for m in (S, T))
            torch.mm(panel, z2.t(), out=s)
            torch.mm(s, z2, out=g1[i : i + c])
            accumulate(s, panel, g2)
            torch.mm(e[i : i + c], e.t(), out=t)
            torch.mm(panel, z1.t(), out=s)
            torch.mm(s, z1, out=g1[i : i + c])
            accumulate(s, panel, g2)

    def directions() -> None:
        for i in range(0, N, c):
            for x, y in ((0, 1), (0, 0), (1, 0), (1, 1)):
                panel = z[x][i : i + c]
                s = torch.mm(panel, z[y].t(), out=S.view(c, N)[: len(panel)])
                torch.mm(s, z[y], out=g1[i : i + c])
                accumulate(s, panel, g2)

    def uniformity() -> None:  # the 3 N^2 D operations of triangular panels
        (x,) = z
        for i in range(0, N, c):
            panel, keys = x[i : i + c], x[i:]
            s = S[: len(panel) * len(keys)].view(len(panel), len(keys))
            torch.mm(panel, keys.t(), out=s)
            accumulate(s.t(), keys, g2[i : i + c])
            if len(keys) > c:
                accumulate(s[:, c:], panel, g2[i + c :])

    if w.op == "distillcse":
        e = torch.cat(x.teachers, 1)
        T = torch.empty(c * N, device=e.device)
        return distillcse
    return {"uniformity": uniformity, "directions": directions}.get(w.op, contrastive)


def yardstick(w: Workload, x: Inputs) -> Callable[[], Tensor]:
    """Copies the row kernel's panel and takes exp of it."""
    S = x.leaves[0].detach()
    out = torch.empty_like(S)
    return lambda: out.copy_(S).exp_()
