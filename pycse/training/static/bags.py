"""Means over bags of tokens, and the gradient of the whole table.

    z_b = 1/n_b Σ_{t in b} w_t            texts b of n_b tokens, rows w_t of the table
    dw_t = Σ_{b with t} dz_b / n_b        a bag a token, of the texts that it is in

So the gradient is a sum over bags too, of dz / n and with the pairs (text, token) sorted by token: PyTorch's fast sum
of rows serves both ways, where its own gradient of EmbeddingBag takes up to twice as long (docs/training.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class _MeanOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(ids, offsets)
        ctx.rows = len(table)
        return embedding_bag(ids, table, offsets, mode="mean")

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None, None]:
        ids, offsets = ctx.saved_tensors
        lengths = torch.diff(offsets, append=torch.full_like(offsets[:1], len(ids)))
        text = torch.repeat_interleave(torch.arange(len(offsets), dtype=torch.int64, device=ids.device), lengths)
        order = torch.argsort(ids, stable=True)  # stable: the sums' order, and so a run, repeats
        counts = torch.bincount(ids, minlength=ctx.rows)
        # A token in no text is an empty bag, whose sum is 0; a text without tokens is in no bag.
        return embedding_bag(text[order], dz / lengths[:, None], counts.cumsum(0) - counts, mode="sum"), None, None


def mean_of_rows(table: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """(texts, D) means of the table's rows ids[offsets[b] : offsets[b + 1]], the last text to the end; 0 of none."""
    return _MeanOfRows.apply(table, ids, offsets)
