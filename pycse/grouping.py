"""Group-P: which group each of a row's teacher similarities belongs to, and the shuffle inside the groups.

Row i holds t_ij for j != i, ranked r = 0, 1, ... by t descending (ties: lower column first).

    mass_j  = floor(2^28 exp((t_ij - max_j t_ij) / group_temperature))    integers: their sums do not depend on an order
    c_r     = mass of the ranks up to and including r,   Z = all of it
    "mass"    group = number of g = 1 ... ceil(1/P) - 1 with c_r >= g P Z
    "size"    group = r // n
    "span"    ranks [start, end) are one group, the others stay where they are

The shuffle is a function of (seed, row, group, members in column order): member n's key is the 32-bit word n mod 4 of
Philox4x32-10 with counter (n div 4, group, row, row >> 32) and key (seed, seed >> 32); sorting the members by key
(ties: lower column) gives the permutation. Two of n members tie with probability n^2 / 2^33.

Here in plain PyTorch for the reference and torch backends; the kernels share kernels/common/{philox,groups}.h.
Source: Xu et al., "DistillCSE", Findings of EMNLP 2023 (arXiv 2310.13499), section 4.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycse.problem import Grouping

MASS_ONE = 2**28  # 2^25 columns of it still are exact in float64
_LOW = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def group_count(P: float) -> int:
    return math.ceil(1 / P)


def groups(t: Tensor, i0: int, cut: Grouping, temperature: float) -> Tensor:
    """(c, B) group of every column; -1 where it stays in place (the diagonal; ranks outside a span)."""
    c, B = t.shape
    diagonal = torch.arange(i0, i0 + c, dtype=torch.int64, device=t.device)[:, None]
    t = t.scatter(1, diagonal, -torch.inf)  # the diagonal ranks last ...
    order = t.argsort(dim=1, descending=True, stable=True)
    order = order.masked_select(order != diagonal).view(c, B - 1)  # ... unless others are -inf as well
    rank = torch.arange(B - 1, dtype=torch.int64, device=t.device).expand(c, -1)
    if cut.kind == "mass":
        shifted = (t.gather(1, order) - t.amax(1, keepdim=True)) / temperature
        finite = torch.isfinite(shifted) | torch.isneginf(shifted)
        mass = torch.where(finite, shifted.exp() * MASS_ONE, 0).long()
        so_far = mass.cumsum(1)
        g = mass_group(so_far.double(), so_far[:, -1:].double(), cut.value)
    elif cut.kind == "size":
        g = rank // int(cut.value)
    else:
        g = torch.where((rank >= int(cut.value)) & (rank < cut.end), 0, -1)
    return torch.full((c, B), -1, dtype=torch.int64, device=t.device).scatter_(1, order, g)


def mass_group(so_far: Tensor, total: Tensor, P: float) -> Tensor:
    """Number of boundaries g P total, g = 1 ... ceil(1/P) - 1, that are at most ``so_far``; exact in float64."""
    last = group_count(P) - 1
    g = (so_far / (P * total)).floor().nan_to_num(0).clamp(0, last)
    low = (g > 0) & (so_far < g * P * total)
    high = ~low & (g < last) & (so_far >= (g + 1) * P * total)
    return (g - low.double() + high.double()).long()


def shuffled(group: Tensor, i0: int, seed: int | Tensor) -> Tensor:
    """(c, B): the column whose teacher probability each column receives."""
    c, B = group.shape
    device = group.device
    columns = torch.arange(B, dtype=torch.int64, device=device).expand(c, -1)
    by_group = group.argsort(dim=1, stable=True)  # members of a group in column order
    g = group.gather(1, by_group)
    starts = torch.searchsorted(g, g.contiguous())  # first position of the position's own group
    n = columns - starts
    row = torch.arange(i0, i0 + c, dtype=torch.int64, device=device)[:, None]
    key = philox(seed, n >> 2, g.clamp_min(0), row, n & 3)
    key = torch.where(g < 0, columns, key)  # in place: already in order
    by_key = key.argsort(dim=1, stable=True)
    order = by_key.gather(1, g.gather(1, by_key).argsort(dim=1, stable=True))
    return torch.empty_like(group).scatter_(1, by_group, by_group.gather(1, order))


def philox(seed: int | Tensor, block: Tensor, group: Tensor, row: Tensor, word: Tensor) -> Tensor:
    """Word ``word`` of Philox4x32-10 (Salmon et al. 2011), as int64 in [0, 2^32)."""
    shape = torch.broadcast_shapes(block.shape, group.shape, row.shape)
    x = [v.expand(shape) & _LOW for v in (block, group, row, row >> 32)]
    if isinstance(seed, int):
        seed = seed % 2**64
    k = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(10):
        a, b = x[0] * _ROUND[0], x[2] * _ROUND[1]  # wrap around 2^64: the bits are right
        x = [
            ((b >> 32) & _LOW) ^ x[1] ^ k[0],
            b & _LOW,
            ((a >> 32) & _LOW) ^ x[3] ^ k[1],
            a & _LOW,
        ]
        k = [(k[0] + _WEYL[0]) & _LOW, (k[1] + _WEYL[1]) & _LOW]
    return torch.stack(x, -1).gather(-1, word[..., None]).squeeze(-1)
