"""The row kernel of the supervised contrastive loss: turns a panel of raw products into losses and gradients, one
program a row.

Symbols (kernels/README.md), panel of c rows from row i0; P the row's positives, the keys of its id (but itself, where
the rows are the keys: SAME), n their number, N the others:
    S (c, N)   S_ij = z1hat_i . z2_j, in z's type      r2 (N,) inverse norms of the keys      s_ij = S_ij r2_j
    l = b s,   e = exp2(l - top),   z_pos = sum_P e,   z_neg = sum_N e,   z = z_pos + z_neg
    L_i  = log n + log(1 + z_neg / z_pos)                                  INSIDE
    L_i  = the same + log(z_pos / n) - mean_P(l - top)                     outside
    G_ij = e b r2_j                                         negatives, in units of f_i = coef_i / z_i
    G_ip = -(e_p / z_pos) z_neg b r2_p                      positives, INSIDE
    G_ip = ((n e_p - z_pos) - z_neg) / n b r2_p             outside
    dlogit (B,): dL/db = sum_j dL/dl_j s_j
No term of a loss is negative, and a confident row (z_neg << z_pos) keeps the digits of z_neg. Positives have a shift
of their own, ``top_pos``: they may all be below what exp2 can say beside the row's maximum. Logits and shift are in
bits.
Stored: loss; with f (c,) given also G over S, f and optionally dlogit. Memory: O(1) beyond that. A visit for z and,
with f, one for G at the positives, which S holds until z is known; where ``shift`` is None a visit for the maxima
before. A row without positives is 0.
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import BIT, LOG2, log1p, number, number_at, resolved


@triton.jit
def keys_of(S, r2, ids2, id_i, i, j, N, ACC: tl.constexpr, SAME: tl.constexpr):
    """s and r of keys j, which of them are positives and which negatives."""
    inside = j < N
    r = tl.load(r2 + j, mask=inside, other=0)
    s = tl.load(S + j, mask=inside, other=0).to(ACC) * r
    of_class = tl.load(ids2 + j, mask=inside, other=0) == id_i
    positive = inside & of_class
    if SAME:
        positive = positive & (j != i)
    return s, r, positive, inside & ~of_class


@triton.jit
def rows(
    S,
    r2,
    ids1,
    ids2,
    coef,
    loss,
    dlogit,
    f,
    b,
    shift,
    i0,
    B,
    N,
    ld,
    SAME: tl.constexpr,
    INSIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = r2.dtype.element_ty
    k = tl.program_id(0)
    i = i0 + k
    S += k.to(tl.int64) * ld
    b = number(b, ACC)
    bits = b * BIT
    id_i = tl.load(ids1 + i)

    if shift is not None:
        top = number(shift, ACC)
        top_pos = top
    else:
        best = tl.full([BLOCK], float("-inf"), ACC)
        best_pos = tl.full([BLOCK], float("-inf"), ACC)
        for a in range(0, N, BLOCK):
            j = a + tl.arange(0, BLOCK)
            s, _, positive, negative = keys_of(S, r2, ids2, id_i, i, j, N, ACC, SAME)
            best = tl.maximum(best, tl.where(negative, s * bits, float("-inf")))
            best_pos = tl.maximum(best_pos, tl.where(positive, s * bits, float("-inf")))
        top_pos = tl.max(best_pos, 0)
        top = tl.maximum(tl.max(best, 0), top_pos)
        top = resolved(tl.where(top == float("-inf"), 0.0, top))  # a row without keys has no maximum

    others = tl.zeros([BLOCK], ACC)
    own = tl.zeros([BLOCK], ACC)
    count = tl.zeros([BLOCK], ACC)
    below = tl.zeros([BLOCK], ACC)
    es = tl.zeros([BLOCK], ACC)
    s_pos = tl.zeros([BLOCK], ACC)
    es_pos = tl.zeros([BLOCK], ACC)
    for a in range(0, N, BLOCK):
        j = a + tl.arange(0, BLOCK)
        s, r, positive, negative = keys_of(S, r2, ids2, id_i, i, j, N, ACC, SAME)
        e = tl.where(negative, tl.exp2(s * bits - top), 0.0)
        x = tl.where(positive, top_pos - s * bits, 0.0)
        e_pos = tl.where(positive, tl.exp2(-x), 0.0)
        others += e
        own += e_pos
        count += tl.where(positive, 1.0, 0.0)
        below += x
        if dlogit is not None:
            es += e * s
            s_pos += tl.where(positive, s, 0.0)
            es_pos += e_pos * s
        if f is not None:
            tl.store(S + j, (e * (b * r)).to(S.dtype.element_ty), mask=(j < N) & ~positive)

    n = tl.sum(count, 0)
    some = n > 0
    n = tl.where(some, n, 1.0)
    z_neg = tl.sum(others, 0)
    w = tl.where(some, tl.sum(own, 0), 1.0)
    scale = tl.where(some, tl.exp2(top_pos - top), 1.0)
    z_pos = w * scale
    ratio = z_neg / z_pos
    loss_i = tl.log(n) + tl.where(
        ratio > 1,
        (tl.log2(z_neg) - tl.log2(w) + (top - top_pos)) * LOG2 + log1p(z_pos / z_neg),  # the ratio itself may overflow
        log1p(ratio),
    )
    if not INSIDE:
        loss_i += tl.where(n > 1, (tl.log2(w / n) + tl.sum(below, 0) / n) * LOG2, 0.0)
    tl.store(loss + i, tl.where(some, loss_i, 0.0))
    if f is not None:
        f_i = tl.where(some, number_at(coef, i, i < B, ACC) / (z_neg + z_pos), 0.0)
        tl.store(f + k, f_i)
        if dlogit is not None:
            if INSIDE:
                Ps = -(tl.sum(es_pos, 0) / w) * z_neg
            else:
                Ps = tl.sum(s_pos, 0)
                Ps = ((n * tl.sum(es_pos, 0) - w * Ps) * scale - z_neg * Ps) / n
            tl.store(dlogit + i, tl.where(some, f_i * (tl.sum(es, 0) + Ps), 0.0))
        for a in range(0, N, BLOCK):  # every thread reads what no other has written
            j = a + tl.arange(0, BLOCK)
            s, r, positive, _ = keys_of(S, r2, ids2, id_i, i, j, N, ACC, SAME)
            e_pos = tl.exp2(tl.where(positive, s * bits - top_pos, 0.0))
            if INSIDE:
                g = -(e_pos / w) * z_neg
            else:
                g = ((n * e_pos - w) * scale - z_neg) / n
            tl.store(S + j, (g * (b * r)).to(S.dtype.element_ty), mask=positive)
