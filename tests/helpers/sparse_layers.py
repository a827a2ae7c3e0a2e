"""Sparse layers of any pattern, and their masks, for tests on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pycse.sparse import SparseLinear

BACKENDS = ["torch", "cpu"]
BLOCKS = [1, 16, 32, 64]
NAMES = {1: "unstructured", 16: "block16", 32: "block32", 64: "block64"}


def random_mask(out, in_, block, density, seed=0):
    """Whole blocks, about ``density`` of them, with an empty block row and an empty block column unless all are
    kept."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(out // block, in_ // block, generator=g) < density
    if 0 < density < 1:
        kept[-1], kept[:, 0] = False, False
        kept[0, -1] = True
    return kept.repeat_interleave(block, 0).repeat_interleave(block, 1)


def layer(out=64, in_=96, block=16, density=0.3, backend="auto", dtype=torch.float32, pattern=None, bias=True):
    torch.manual_seed(0)
    dense = torch.nn.Linear(in_, out, bias=bias, dtype=dtype)
    mask = random_mask(out, in_, block, density)
    return dense, SparseLinear.from_dense(dense, mask, pattern or NAMES[block], backend)


def expected(dense, mask, x):
    return F.linear(x, dense.weight * mask, dense.bias)
