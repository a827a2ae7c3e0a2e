"""The symmetric loss: rows and columns share every similarity (B = N, row i's positive is key i).

Symbols (kernels/README.md), formulas in logit.py; lneg, lse of a row or, with ^c, of a column:
    L_i  = (row_i + column_i) / 2,   row_i = log(1 + sum_{j != i} exp(l_ij - l_ii)),   column_j likewise over i
    P_ij = (coef_i exp(l_ij - lse_i) + coef_j exp(l_ij - lse^c_j)) / 2                     i != j
    P_ii = -coef_i (sigma(lneg_i - l_ii) + sigma(lneg^c_i - l_ii)) / 2
    G    = P l' r2,     dL/dtau = -sum P l / tau,     dL/dm = sum_{i != j} P s / tau
``columns`` folds a panel into the columns' running maxima and sums, a program for a block of columns; ``symmetric``
writes G over S once all log-sums are known, a program for a row. Inside, logits, ``shift`` and column_max
are in bits; lpos, lneg, lneg_column and lse_column are not. Stored between the sweeps: O(N).
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import (
    BIT,
    LOG2,
    inverse,
    log_add,
    logit,
    negatives,
    number,
    number_at,
    positive_cosine,
    probability,
    sigmoid,
    slope,
)


@triton.jit
def columns(
    S,
    r2,
    query_ids,
    key_ids,
    s_pos,
    column_max,
    column_sum,
    tau,
    m,
    shift,
    exclude_above,
    i0,
    c,
    N,
    ld,
    FOCAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ACC: tl.constexpr = r2.dtype.element_ty
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    bits = inverse(tau, ACC) * BIT
    m = number(m, ACC)
    r = tl.load(r2 + j, mask=j < N, other=0)[None, :]
    top = tl.load(column_max + j, mask=j < N, other=0)
    total = tl.load(column_sum + j, mask=j < N, other=0)
    threshold = None
    if exclude_above is not None:
        threshold = (tl.load(s_pos + j, mask=j < N, other=0) + number(exclude_above, ACC))[None, :]
    if shift is not None:
        top = tl.full([COLUMNS], 0, ACC) + number(shift, ACC)

    for a in range(0, c, ROWS):
        k = a + tl.arange(0, ROWS)
        i = (i0 + k)[:, None]
        inside = (k < c)[:, None]
        at = S + k.to(tl.int64)[:, None] * ld + j[None, :]
        s = tl.load(at, mask=inside & (j < N)[None, :], other=0).to(ACC) * r
        l = negatives(logit(s, m, bits, FOCAL), s, j[None, :], i, i, threshold, query_ids, key_ids, None, N, N, inside)
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
    coef,
    s_pos,
    lpos,
    lneg,
    lneg_column,
    lse_column,
    dtau,
    dm,
    tau,
    m,
    exclude_above,
    i0,
    N,
    ld,
    FOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = r2.dtype.element_ty
    k = tl.program_id(0)
    i = i0 + k
    S += k.to(tl.int64) * ld
    inv_tau = inverse(tau, ACC)
    bits = inv_tau * BIT
    m = number(m, ACC)
    r_pos = tl.load(r2 + i)
    s_ii = positive_cosine(S, s_pos, i, i, r_pos)
    l_pos = tl.load(lpos + i)
    lneg_i = tl.load(lneg + i)
    lse = log_add(lneg_i, l_pos) * BIT
    coef_i = number_at(coef, i, i < N, ACC)

    sum_l = tl.zeros([BLOCK], ACC)
    sum_s = tl.zeros([BLOCK], ACC)
    for a in range(0, N, BLOCK):
        j = a + tl.arange(0, BLOCK)
        r = tl.load(r2 + j, mask=j < N, other=0)
        s = tl.load(S + j, mask=j < N, other=0).to(ACC) * r
        l = logit(s, m, bits, FOCAL)
        coef_j = number_at(coef, j, j < N, ACC)
        lse_j = tl.load(lse_column + j, mask=j < N, other=0) * BIT
        if exclude_above is not None:
            delta = number(exclude_above, ACC)
            s_jj = tl.load(s_pos + j, mask=j < N, other=0)
            l_row = negatives(l, s, j, i, i, s_ii + delta, query_ids, key_ids, None, N, N, i < N)
            l_column = negatives(l, s, j, i, i, s_jj + delta, query_ids, key_ids, None, N, N, i < N)
        else:
            l_row = negatives(l, s, j, i, i, None, query_ids, key_ids, None, N, N, i < N)
            l_column = l_row
        P = 0.5 * (coef_i * probability(l_row - lse) + coef_j * probability(l_column - lse_j))
        if dtau is not None:
            sum_l += P * l
        if dm is not None:
            sum_s += P * s
        tl.store(S + j, (P * slope(s, m, FOCAL) * r * inv_tau).to(S.dtype.element_ty), mask=j < N)

    P_pos = -0.5 * coef_i * (sigmoid(lneg_i - l_pos) + sigmoid(tl.load(lneg_column + i) - l_pos))
    tl.debug_barrier()  # G at the positive is written last
    tl.store(S + i, (P_pos * inv_tau * slope(s_ii, 0.0, FOCAL) * r_pos).to(S.dtype.element_ty))
    if dtau is not None:
        tl.store(dtau + i, -inv_tau * (tl.sum(sum_l, 0) * LOG2 + P_pos * l_pos))
    if dm is not None:
        tl.store(dm + i, inv_tau * tl.sum(sum_s, 0))
