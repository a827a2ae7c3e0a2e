"""Which texts of a batch are equal, from their token ids: no sampler has to keep duplicates apart.

A text is known by a 64-bit hash of its tokens and their places. Rows whose anchors or positives are equal texts belong
together, and so does what these rows are equal to (connected components): a key that belongs to a row is none of its
negatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Odd 64-bit constants of splitmix64, as signed numbers; products wrap around.
_PLACE, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


NOT_TEXT = {"pixel_values", "pixel_values_videos", "input_features", "input_values", "inputs_embeds"}


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def hashes(features: dict[str, Any]) -> Tensor | None:
    """(B,) int64, equal where texts are; None where a column has no token ids, or images and the like beside them.

    Padding does not count, on either side; a prompt does. Features are those of a transformer, ``input_ids`` (B, L)
    with ``attention_mask``, or in one row with ``cu_seq_lens_q`` between its texts; or of a StaticEmbedding, flat
    ``input_ids`` with ``offsets``.
    """
    ids = features.get("input_ids")
    if not isinstance(ids, Tensor) or not NOT_TEXT.isdisjoint(features):
        return None
    offsets = features.get("offsets")
    if (bounds := features.get("cu_seq_lens_q")) is not None:
        ids, offsets = ids.flatten(), bounds[:-1].long()
    if offsets is not None and ids.dim() == 1:
        place = torch.arange(len(ids), dtype=torch.int64, device=ids.device)
        row = torch.searchsorted(offsets, place, right=True) - 1
        token = _mixed((ids.long() + 1) ^ ((place - offsets[row]) * _PLACE))
        return _mixed(torch.zeros_like(offsets).index_add_(0, row, token))
    if ids.dim() != 2:
        return None
    mask = features.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    place = real.long().cumsum(1)
    token = _mixed((ids.long() + 1) ^ (place * _PLACE))
    return _mixed(torch.where(real, token, 0).sum(1))


def ids_of(columns: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Ids of rows and keys, (B,) and (N,), from the hashes of anchors, positives and negatives; None where no two texts
    are equal, and nothing has to be left out."""
    anchors, positives, *negatives = columns
    B = len(anchors)
    every = torch.cat(columns)
    found, place = torch.unique(every, return_inverse=True)
    # A row whose anchor is its positive (two views of a text) is equal to itself alone.
    expected = len(every) - int((anchors == positives).sum())
    if len(found) == expected:
        return None
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    place = place.cpu()
    a, p = place[:B].numpy(), place[B : 2 * B].numpy()
    edges = coo_array((torch.ones(B, dtype=torch.int8, device="cpu").numpy(), (a, p)), shape=(len(found),) * 2)
    _, component = connected_components(edges, directed=False)
    ids = torch.from_numpy(component).long()[place].to(every.device)  # a negative alone is a component of its own
    return ids[:B], ids[B:]
