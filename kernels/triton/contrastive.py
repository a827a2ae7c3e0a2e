"""The row kernel: turns a panel of raw products into losses and gradients, one program a row.

Symbols (kernels/README.md), panel of c rows from row i0, formulas in logit.py:
    S (c, N)      S_ij = z1hat_i . z2_j, in z's type      r2 (N,) inverse norms of the keys     s_ij = S_ij r2_j
    L_i  = log(1 + sum_neg exp(l_ij - l_i,pos))
    G_ij = e_ij l'(s_ij) r2_j                  negatives, in units of f_i = coef_i / z_i, e_ij = exp2(l_ij - shift_i)
    G_ip = -z_neg,i l'_pos(s_ip) r2_p          the positive
    dlogit (5, B): P_pos s_pos^2, P_pos s_pos, P_pos, f sum_neg e s^2, f sum_neg e s,   P_pos = -f z_neg
T (c, N), a guide's similarities: key j is no negative where T_ij is above the bound that T_ip and ``guide_above`` make.
``positives`` makes s_pos (B,) from the embeddings, for panels that round it. Logits and ``shift`` are in
bits (logit.py), lpos and lneg are not.
Stored: loss, optionally lpos, lneg (B,); with f (c,) given also G over S, f and optionally dlogit. Memory: O(1) beyond
that. One visit where ``shift`` bounds the logits; where it is None a visit for the row's exact maximum goes before.
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import (
    LOG2,
    derivative,
    logit,
    negatives,
    number,
    number_at,
    positive_cosine,
    positive_logit,
    positive_of,
    resolved,
    row_results,
    store_gradients,
    threshold_of,
)


@triton.jit
def rows(
    S,
    r2,
    s_pos,
    positives,
    query_ids,
    key_ids,
    exclude,
    T,
    guide_above,
    coef,
    loss,
    lpos,
    lneg,
    dlogit,
    f,
    pos_q,
    pos_b,
    pos_c,
    q,
    b,
    slope,
    own_b,
    own_c,
    shift,
    i0,
    B,
    N,
    ld,
    ld_T,
    LINEAR: tl.constexpr,
    EXCLUDE_BY: tl.constexpr,
    GUIDE_BY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = r2.dtype.element_ty
    k = tl.program_id(0)
    i = i0 + k
    S += k.to(tl.int64) * ld
    pos_q, pos_b, pos_c = number(pos_q, ACC), number(pos_b, ACC), number(pos_c, ACC)
    q, b, slope = number(q, ACC), number(b, ACC), number(slope, ACC)
    pos = positive_of(positives, i, i < B, N)
    r_pos = tl.load(r2 + pos, mask=pos >= 0, other=0)
    s_pos = positive_cosine(S, s_pos, i, pos, r_pos)
    threshold = None
    if exclude is not None:
        threshold = threshold_of(s_pos, exclude, i, i < B, EXCLUDE_BY)
    if T is not None:
        T += k.to(tl.int64) * ld_T
        t_pos = tl.load(T + pos, mask=pos >= 0, other=0).to(ACC)
        guide_bound = threshold_of(t_pos, guide_above, i, i < B, GUIDE_BY)

    if shift is not None:
        top = number(shift, ACC)
    else:
        best = tl.full([BLOCK], float("-inf"), ACC)
        for a in range(0, N, BLOCK):
            j = a + tl.arange(0, BLOCK)
            s = tl.load(S + j, mask=j < N, other=0).to(ACC) * tl.load(r2 + j, mask=j < N, other=0)
            l = logit(s, q, b, LINEAR)
            l = negatives(l, s, j, i, pos, threshold, query_ids, key_ids, own_b, own_c, B, N, i < B)
            if T is not None:
                t = tl.load(T + j, mask=j < N, other=0).to(ACC)
                l = tl.where(t > guide_bound, float("-inf"), l)
            best = tl.maximum(best, l)
        top = resolved(tl.maximum(tl.max(best, 0), positive_logit(s_pos, pos_q, pos_b, pos_c, LINEAR)))

    z = tl.zeros([BLOCK], ACC)
    ess = tl.zeros([BLOCK], ACC)
    es = tl.zeros([BLOCK], ACC)
    for a in range(0, N, BLOCK):
        j = a + tl.arange(0, BLOCK)
        r = tl.load(r2 + j, mask=j < N, other=0)
        s = tl.load(S + j, mask=j < N, other=0).to(ACC) * r
        l = logit(s, q, b, LINEAR)
        l = negatives(l, s, j, i, pos, threshold, query_ids, key_ids, own_b, own_c, B, N, i < B)
        if T is not None:
            t = tl.load(T + j, mask=j < N, other=0).to(ACC)
            l = tl.where(t > guide_bound, float("-inf"), l)
        e = tl.exp2(l - top)
        z += e
        if dlogit is not None:
            ess += e * s * s
            es += e * s
        if f is not None:
            g = e * (derivative(s, q, slope, LINEAR) * r)
            tl.store(S + j, g.to(S.dtype.element_ty), mask=j < N)

    z_neg = tl.sum(z, 0)
    coef_i = number_at(coef, i, i < B, ACC)
    l_pos, loss_i, f_i, g_pos = row_results(z_neg, s_pos, r_pos, top, coef_i, pos_q, pos_b, pos_c, LINEAR)
    tl.store(loss + i, loss_i)
    if lpos is not None:
        tl.store(lpos + i, l_pos * LOG2)
        tl.store(lneg + i, (tl.log2(z_neg) + top) * LOG2)
    if f is not None:
        tl.debug_barrier()  # G at the positive is written last
        tl.store(S + pos, g_pos.to(S.dtype.element_ty), mask=pos >= 0)
        tl.store(f + k, f_i)
        if dlogit is not None:
            store_gradients(dlogit, i, B, -f_i * z_neg, s_pos, f_i * tl.sum(ess, 0), f_i * tl.sum(es, 0))


@triton.jit
def positives(z1hat, z2, r2, indices, s_pos, i0, N, D, ld1, ld2, BLOCK: tl.constexpr):
    ACC: tl.constexpr = r2.dtype.element_ty
    k = tl.program_id(0)
    i = i0 + k
    pos = tl.maximum(positive_of(indices, i, i >= 0, N), 0)  # ``rows`` gives a row without one its NaN
    z1hat += k.to(tl.int64) * ld1
    z2 += pos.to(tl.int64) * ld2
    dots = tl.zeros([BLOCK], ACC)
    for a in range(0, D, BLOCK):
        d = a + tl.arange(0, BLOCK)
        x = tl.load(z1hat + d, mask=d < D, other=0).to(ACC)
        dots += x * tl.load(z2 + d, mask=d < D, other=0).to(ACC)
    tl.store(s_pos + i, tl.sum(dots, 0) * tl.load(r2 + pos))
