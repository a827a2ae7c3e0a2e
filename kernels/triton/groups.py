"""Group-P on the device: cuts a teacher's ranking into groups and shuffles inside them. pycse/grouping.py defines both.

Symbols: n = B - 1 columns, those but the diagonal; t (c, n) teacher similarities, ``ranked`` t in descending order
(ties: lower column first), ``order`` the column of every rank. Everything (c, n) is contiguous. ``cut`` and ``tails``
sum along rows, a program each; the others take blocks of the flattened panel of c n < 2^31 entries.
    mass_k  = floor(2^28 exp((ranked_k - ranked_0) / temperature)),   so_far_k = sum of mass up to rank k     (int64)
    level_k = group of rank k: mass  number of boundaries g P total, g = 1 ... ceil(1/P) - 1, at most so_far_k
                               size  k div size            span  0 in [start, end), else -1
    key     = group << 32 | word n mod 4 of Philox4x32-10, counter (n div 4, group, row, row >> 32), of its member n.
              A stable sort by key of members in column order keeps groups together and shuffles them.
    source  = the column whose q a column receives
    mean    = mean over the group of e = exp((t - max t) / tau_t), from sums that start at the smallest e:
              tail_k = sum of e from rank k on, mean = (tail_first - tail_last) / (last - first)      (float64)
Stored: group, source (int32), key (int64), tail (float64), mean (acc): (c, n) each. The sorts between are the caller's.
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import BIT, number

MASS_ONE = tl.constexpr(268435456.0)  # 2^28
IN_PLACE = tl.constexpr(-1)  # group of the columns that no group has: they stay


@triton.jit
def mass(ranked, k, n, temperature):
    """Of ranks k; 0 beyond n, and for NaN."""
    x = (tl.load(ranked + k, mask=k < n, other=float("-inf")) - tl.load(ranked)) / temperature
    return (tl.exp(tl.where(x <= 0, x, float("-inf"))) * MASS_ONE).to(tl.int64)


@triton.jit
def mass_group(so_far, total, P, last):
    """pycse.grouping.mass_group: a guess by division, put right by the same comparisons."""
    so_far = so_far.to(tl.float64)
    total = total.to(tl.float64)
    last = number(last, tl.int32)
    guess = tl.floor(so_far / (P * tl.where(total > 0, total, 1.0)))
    g = tl.minimum(guess, last.to(tl.float64)).to(tl.int32)
    low = (g > 0) & (so_far < g.to(tl.float64) * P * total)
    high = (g < last) & (so_far >= (g + 1).to(tl.float64) * P * total)
    return tl.where(low, g - 1, tl.where(high, g + 1, g))


@triton.jit
def cut(ranked, order, group, temperature, P, start, end, last, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Groups by column, or by rank where ``order`` is None. ``start`` is the size of groups for KIND "size"."""
    ACC: tl.constexpr = ranked.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * n
    ranked += row
    group += row
    if KIND == "mass":
        temperature = number(temperature, ACC)
        P = number(P, tl.float64)
        sums = tl.zeros([BLOCK], tl.int64)
        for a in range(0, n, BLOCK):
            sums += mass(ranked, a + tl.arange(0, BLOCK), n, temperature)
        total = tl.sum(sums, 0)
        before = total * 0
    for a in range(0, n, BLOCK):
        k = a + tl.arange(0, BLOCK)
        if KIND == "mass":
            m = mass(ranked, k, n, temperature)
            g = mass_group(before + tl.cumsum(m, 0), total, P, last)
            before += tl.sum(m, 0)
        elif KIND == "size":
            g = k // start
        else:
            g = tl.where((k >= start) & (k < end), 0, IN_PLACE)
        at = k
        if order is not None:
            at = tl.load(order + row + k, mask=k < n, other=0)
        tl.store(group + at, g, mask=k < n)


@triton.jit
def first_at_least(ordered, x, n, steps):
    """Where x would be put, first among equals, in n ordered numbers; n < 2^steps."""
    low = n * 0
    high = n
    for _ in range(0, steps):
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(ordered + middle, mask=open_, other=0) < x
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    return low


@triton.jit(do_not_specialize=["seed"])
def keys(group, key, seed, i0, c, n, steps, BLOCK: tl.constexpr):
    """group (c, n) is sorted: members of a group stand together, in column order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < c * n
    row = at // n
    k = at - row * n
    g = tl.load(group + at, mask=inside, other=0)
    member = k - first_at_least(group + row * n, g, tl.where(inside, n, 0), steps)
    i = row + i0
    w0, w1, w2, w3 = tl.philox(number(seed, tl.int64), member >> 2, tl.maximum(g, 0), i, i * 0)
    word = member & 3
    w = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)).to(tl.int64)
    w = tl.where(g == IN_PLACE, k.to(tl.int64), w)  # in order already
    tl.store(key + at, (g.to(tl.int64) << 32) | w, mask=inside)


@triton.jit
def replay(by_group, by_key, source, c, n, BLOCK: tl.constexpr):
    """Member n of a group in column order receives from its member n in key order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < c * n
    row = at // n * n
    to = tl.load(by_group + at, mask=inside, other=0)
    drawn = tl.load(by_key + at, mask=inside, other=0)
    j = tl.load(by_group + row + drawn, mask=inside, other=0)
    tl.store(source + row + to, j.to(tl.int32), mask=inside)


@triton.jit
def tails(ranked, tail, inv_tau, n, BLOCK: tl.constexpr):
    ACC: tl.constexpr = ranked.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * n
    ranked += row
    bits = number(inv_tau, ACC) * BIT
    top = tl.load(ranked)
    after = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
    for a in range(0, n, BLOCK):
        k = n - 1 - a - tl.arange(0, BLOCK)
        e = tl.exp2((tl.load(ranked + k, mask=k >= 0, other=float("-inf")) - top) * bits).to(tl.float64)
        e = tl.where(k >= 0, e, 0)
        tl.store(tail + row + k, after + tl.cumsum(e, 0), mask=k >= 0)
        after += tl.sum(e, 0)


@triton.jit
def means(
    ranked, order, level, tail, mean, inv_tau, start, end, c, n, steps, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    ACC: tl.constexpr = ranked.dtype.element_ty
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < c * n
    row = at // n * n
    k = at - row
    if KIND == "mass":
        g = tl.load(level + at, mask=inside, other=0)
        first = first_at_least(level + row, g, tl.where(inside, n, 0), steps)
        last = first_at_least(level + row, g + 1, tl.where(inside, n, 0), steps)
    elif KIND == "size":
        first = k // start * start
        last = tl.minimum(first + start, n)
    else:
        first = k * 0 + start
        last = k * 0 + end
    sums = tl.load(tail + row + first, mask=inside, other=0)
    sums -= tl.load(tail + row + last, mask=inside & (last < n), other=0)
    e = (sums / tl.maximum(last - first, 1)).to(ACC)
    if KIND == "span":
        top = tl.load(ranked + row, mask=inside, other=0)
        own = tl.exp2((tl.load(ranked + at, mask=inside, other=0) - top) * (number(inv_tau, ACC) * BIT))
        e = tl.where((k >= start) & (k < end), e, own)
    tl.store(mean + row + tl.load(order + at, mask=inside, other=0), e, mask=inside)
