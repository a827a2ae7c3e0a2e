"""The symmetric loss: rows and columns share every similarity (B = N, row i's positive is key i).

Symbols (kernels/README.md), formulas in logit.py; lneg, lse of a row or, with ^c, of a column:
    L_i  = (row_i + column_i) / 2,   row_i = log(1 + sum_{j != i} exp(l_ij - l_ii)),   column_j likewise over i
    P_ij = (coef_i exp(l_ij - lse_i) + coef_j exp(l_ij - lse^c_j)) / 2                     i != j
    P_ii = -coef_i (sigma(lneg_i - l_ii) + sigma(lneg^c_i - l_ii)) / 2
    G    = P l' r2
    dlogit (5, B): P_ii s_ii^2, P_ii s_ii, P_ii, sum_{j != i} P_ij s_ij^2, sum_{j != i} P_ij s_ij
``columns`` folds a panel into the columns' running maxima and sums, a program for a block of columns; ``symmetric``
writes G over S once all log-sums are known, a program for a row. Inside, logits, ``shift`` and column_max
are in bits; lpos, lneg, lneg_column and lse_column are not. Stored between the sweeps: O(N).
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import (
    BIT,
    derivative,
    log_add,
    logit,
    negatives,
    number,
    number_at,
    positive_cosine,
    probability,
    sigmoid,
    store_gradients,
    threshold_of,
)


@triton.jit
def columns(
    S,
    r2,
    query_ids,
    key_ids,
    s_pos,
    exclude,
    column_max,
    column_sum,
    q,
    b,
    shift,
    i0,
    c,
    N,
    ld,
    LINEAR: tl.constexpr,
    EXCLUDE_BY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ACC: tl.constexpr = r2.dtype.element_ty
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    q, b = number(q, ACC), number(b, ACC)
    r = tl.load(r2 + j, mask=j < N, other=0)[None, :]
    top = tl.load(column_max + j, mask=j < N, other=0)
    total = tl.load(column_sum + j, mask=j < N, other=0)
    threshold = None
    if exclude is not None:
        s_jj = tl.load(s_pos + j, mask=j < N, other=0)
        threshold = threshold_of(s_jj, exclude, j, j < N, EXCLUDE_BY)[None, :]
    if shift is not None:
        top = tl.full([COLUMNS], 0, ACC) + number(shift, ACC)

    for a in range(0, c, ROWS):
        k = a + tl.arange(0, ROWS)
        i = (i0 + k)[:, None]
        inside = (k < c)[:, None]
        at = S + k.to(tl.int64)[:, None] * ld + j[None, :]
        s = tl.load(at, mask=inside & (j < N)[None, :], other=0).to(ACC) * r
        l = logit(s, q, b, LINEAR)
        l = negatives(l, s, j[None, :], i, i, threshold, query_ids, key_ids, None, None, N, N, inside)
        l = tl.where(inside, l, float("-inf"))
        if shift is not None:
            total += tl.sum(tl.exp2(l - top[None, :]), 0)
        else:
            higher = tl.maximum(top, tl.max(l, 0))
            safe = tl.where(higher == float("-inf"), 0.0, higher)  # no negative yet
            total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(l - safe[None, :]), 0)
            top = higher
    tl.store(column_max + j, top, mask=j < N)
    tl.store(column_sum + j, total, mask=j < N)


@triton.jit
def symmetric(
    S,
    r2,
    query_ids,
    key_ids,
    exclude,
    coef,
    s_pos,
    lpos,
    lneg,
    lneg_column,
    lse_column,
    dlogit,
    pos_q,
    pos_b,
    q,
    b,
    slope,
    i0,
    N,
    ld,
    LINEAR: tl.constexpr,
    EXCLUDE_BY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = r2.dtype.element_ty
    k = tl.program_id(0)
    i = i0 + k
    S += k.to(tl.int64) * ld
    pos_q, pos_b = number(pos_q, ACC), number(pos_b, ACC)
    q, b, slope = number(q, ACC), number(b, ACC), number(slope, ACC)
    r_pos = tl.load(r2 + i)
    s_ii = positive_cosine(S, s_pos, i, i, r_pos)
    l_pos = tl.load(lpos + i)
    lneg_i = tl.load(lneg + i)
    lse = log_add(lneg_i, l_pos) * BIT
    coef_i = number_at(coef, i, i < N, ACC)
    if exclude is not None:
        threshold = threshold_of(s_ii, exclude, i, i < N, EXCLUDE_BY)

    P_ss = tl.zeros([BLOCK], ACC)
    P_s = tl.zeros([BLOCK], ACC)
    for a in range(0, N, BLOCK):
        j = a + tl.arange(0, BLOCK)
        r = tl.load(r2 + j, mask=j < N, other=0)
        s = tl.load(S + j, mask=j < N, other=0).to(ACC) * r
        l = logit(s, q, b, LINEAR)
        coef_j = number_at(coef, j, j < N, ACC)
        lse_j = tl.load(lse_column + j, mask=j < N, other=0) * BIT
        if exclude is not None:
            s_jj = tl.load(s_pos + j, mask=j < N, other=0)
            column_threshold = threshold_of(s_jj, exclude, j, j < N, EXCLUDE_BY)
            l_row = negatives(l, s, j, i, i, threshold, query_ids, key_ids, None, None, N, N, i < N)
            l_column = negatives(l, s, j, i, i, column_threshold, query_ids, key_ids, None, None, N, N, i < N)
        else:
            l_row = negatives(l, s, j, i, i, None, query_ids, key_ids, None, None, N, N, i < N)
            l_column = l_row
        P = 0.5 * (coef_i * probability(l_row - lse) + coef_j * probability(l_column - lse_j))
        if dlogit is not None:
            P_ss += P * s * s
            P_s += P * s
        g = P * (derivative(s, q, slope, LINEAR) * r)
        tl.store(S + j, g.to(S.dtype.element_ty), mask=j < N)

    P_pos = -0.5 * coef_i * (sigmoid(lneg_i - l_pos) + sigmoid(tl.load(lneg_column + i) - l_pos))
    tl.debug_barrier()  # G at the positive is written last
    tl.store(S + i, (P_pos * derivative(s_ii, pos_q, pos_b, LINEAR) * r_pos).to(S.dtype.element_ty))
    if dlogit is not None:
        store_gradients(dlogit, i, N, P_pos, s_ii, tl.sum(P_ss, 0), tl.sum(P_s, 0))
