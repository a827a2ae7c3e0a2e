"""The row kernels of a loss at several lengths: panels of the products of K blocks of features become gradients.

Symbols (kernels/README.md), panel of c rows from row i0, lengths k < K along the first axis of every tile:
    S (K, c, N)   S^b_ij = z1hat_i[b] . z2_j[b], in z's type        raw^k_ij = sum_{b <= k} S^b_ij
    rho (K, c), r2 (K, N) inverse norms of the rows' and the keys' prefixes      s^k_ij = raw^k_ij rho^k_i r2^k_j
    numbers (7, K)  pos_q, pos_b, pos_c, q, b, slope and the length's weight; a logit is that of logit.py
    G^k_ij = f^k_i e^k_ij l'(s^k_ij) rho^k_i r2^k_j                 dL/draw^k_ij; of the positive, g_pos^k_i
    S^b_ij becomes H^b_ij = sum_{k >= b} G^k_ij
    t^k_i = sum_j G^k_ij raw^k_ij,   columns^k_j = sum_i of the same
Two visits of the panels, all lengths in each: ``sums``, a program a row, for losses and what ``gradients`` takes of a
row (results (5, K, c): s_pos, g_pos, f, the shift in bits, t); then tiles of ROWS x COLUMNS, which add up their columns.
Stored: those, loss (K, B), dlogit (K, 5, B), and a sum of columns for each run of ROWS rows: no atomics.
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import (
    derivative,
    logit,
    negatives,
    number_at,
    positive_logit,
    positive_of,
    resolved,
    row_results,
    threshold_of,
)


@triton.jit
def coefficients(numbers, row, K, LENGTHS: tl.constexpr):
    """One of the numbers of all lengths; 0 for those that only fill the tile."""
    k = tl.arange(0, LENGTHS)
    return tl.load(numbers + row * K + k, mask=k < K, other=0)


@triton.jit
def row_result(results, which, row, c, K, LENGTHS: tl.constexpr):
    k = tl.arange(0, LENGTHS)
    return tl.load(results + (which * K + k) * c + row, mask=k < K, other=0)


@triton.jit
def tile(S, r2, rho, row, j, step, ld, N, K, LENGTHS: tl.constexpr):
    """raw, and the inverse norms rho r2, of all lengths and keys j."""
    k = tl.arange(0, LENGTHS)[:, None]
    inside = (k < K) & (j[None, :] < N)
    at = k.to(tl.int64) * step + row.to(tl.int64) * ld + j[None, :]
    raw = tl.cumsum(tl.load(S + at, mask=inside, other=0).to(r2.dtype.element_ty), 0)
    r = tl.load(r2 + k.to(tl.int64) * N + j[None, :], mask=inside, other=0) * rho[:, None]
    return raw, r


@triton.jit
def logits(s, j, i, pos, threshold, T, t_row, guide_bound, q, b, query_ids, key_ids, own_b, own_c, B, N,
           LINEAR: tl.constexpr):  # fmt: skip
    l = logit(s, q[:, None], b[:, None], LINEAR)
    bound = None
    if threshold is not None:
        bound = threshold[:, None]
    l = negatives(l, s, j[None, :], i, pos, bound, query_ids, key_ids, own_b, own_c, B, N, i < B)
    if T is not None:
        t = tl.load(t_row + j, mask=j < N, other=0).to(s.dtype)
        l = tl.where(t[None, :] > guide_bound, float("-inf"), l)
    return l


@triton.jit
def sums(
    S, rho, r2, s_pos, positives, query_ids, key_ids, exclude, T, guide_above, coef, numbers, loss, dlogit, results,
    own_b, own_c, shift, i0, c, B, N, K, step, ld, ld_T,
    LINEAR: tl.constexpr, EXCLUDE_BY: tl.constexpr, GUIDE_BY: tl.constexpr, LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = r2.dtype.element_ty
    row = tl.program_id(0)
    i = i0 + row
    k = tl.arange(0, LENGTHS)
    inside = k < K
    pos_q, pos_b = coefficients(numbers, 0, K, LENGTHS), coefficients(numbers, 1, K, LENGTHS)
    pos_c, q = coefficients(numbers, 2, K, LENGTHS), coefficients(numbers, 3, K, LENGTHS)
    b, slope = coefficients(numbers, 4, K, LENGTHS), coefficients(numbers, 5, K, LENGTHS)
    rho_i = tl.load(rho + k * c + row, mask=inside, other=0)
    pos = positive_of(positives, i, i < B, N)
    given = tl.where(pos >= 0, k, K) < K
    r_pos = tl.load(r2 + k.to(tl.int64) * N + pos, mask=given, other=0) * rho_i
    if s_pos is not None:
        s_i = tl.load(s_pos + k.to(tl.int64) * B + i, mask=inside, other=0)
    else:
        at = k.to(tl.int64) * step + row.to(tl.int64) * ld + pos
        s_i = tl.cumsum(tl.load(S + at, mask=given, other=0).to(ACC), 0) * r_pos
    s_i = tl.where(pos >= 0, s_i, float("nan"))
    threshold = None
    if exclude is not None:
        threshold = threshold_of(s_i, exclude, i, i < B, EXCLUDE_BY)
    t_row = None
    guide_bound = None
    if T is not None:
        t_row = T + row.to(tl.int64) * ld_T
        t_pos = tl.load(t_row + pos, mask=pos >= 0, other=0).to(ACC)
        guide_bound = threshold_of(t_pos, guide_above, i, i < B, GUIDE_BY)

    if shift is not None:
        top = tl.load(shift + k, mask=inside, other=0)
    else:
        best = tl.full([LENGTHS, BLOCK], float("-inf"), ACC)
        for a in range(0, N, BLOCK):
            j = a + tl.arange(0, BLOCK)
            raw, r = tile(S, r2, rho_i, row, j, step, ld, N, K, LENGTHS)
            l = logits(raw * r, j, i, pos, threshold, T, t_row, guide_bound, q, b, query_ids, key_ids, own_b, own_c,
                       B, N, LINEAR)  # fmt: skip
            best = tl.maximum(best, l)
        top = resolved(tl.maximum(tl.max(best, 1), positive_logit(s_i, pos_q, pos_b, pos_c, LINEAR)))

    z = tl.zeros([LENGTHS, BLOCK], ACC)
    ess = tl.zeros([LENGTHS, BLOCK], ACC)
    es = tl.zeros([LENGTHS, BLOCK], ACC)
    for a in range(0, N, BLOCK):
        j = a + tl.arange(0, BLOCK)
        raw, r = tile(S, r2, rho_i, row, j, step, ld, N, K, LENGTHS)
        s = raw * r
        l = logits(s, j, i, pos, threshold, T, t_row, guide_bound, q, b, query_ids, key_ids, own_b, own_c, B, N, LINEAR)
        e = tl.exp2(l - top[:, None])
        z += e
        if results is not None:
            es += e * s
            ess += e * s * s

    z_neg = tl.sum(z, 1)
    coef_i = number_at(coef, i, i < B, ACC) * coefficients(numbers, 6, K, LENGTHS)
    l_pos, loss_i, f_i, g_pos = row_results(z_neg, s_i, r_pos, top, coef_i, pos_q, pos_b, pos_c, LINEAR)
    tl.store(loss + k.to(tl.int64) * B + i, loss_i, mask=inside)
    if results is not None:
        P_ss, P_s, P_pos = f_i * tl.sum(ess, 1), f_i * tl.sum(es, 1), -f_i * z_neg
        t = slope * P_s + P_pos * derivative(s_i, pos_q, pos_b, LINEAR) * s_i
        if not LINEAR:
            t += 2.0 * q * P_ss
        at = results + k * c + row
        size = K * c
        tl.store(at, s_i, mask=inside)
        tl.store(at + size, g_pos * f_i, mask=inside)
        tl.store(at + 2 * size, f_i, mask=inside)
        tl.store(at + 3 * size, top, mask=inside)
        tl.store(at + 4 * size, t, mask=inside)
        if dlogit is not None:
            at = dlogit + k.to(tl.int64) * 5 * B + i
            tl.store(at, P_pos * s_i * s_i, mask=inside)
            tl.store(at + B, P_pos * s_i, mask=inside)
            tl.store(at + 2 * B, P_pos, mask=inside)
            tl.store(at + 3 * B, P_ss, mask=inside)
            tl.store(at + 4 * B, P_s, mask=inside)


@triton.jit
def gradients(
    S, rho, r2, results, positives, query_ids, key_ids, exclude, T, guide_above, numbers, columns, own_b, own_c,
    i0, c, B, N, K, step, ld, ld_T,
    LINEAR: tl.constexpr, EXCLUDE_BY: tl.constexpr, GUIDE_BY: tl.constexpr, LENGTHS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = r2.dtype.element_ty
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(1)
    k = tl.arange(0, LENGTHS)[:, None]
    inside = (k < K) & (j[None, :] < N)
    q, b = coefficients(numbers, 3, K, LENGTHS), coefficients(numbers, 4, K, LENGTHS)
    slope = coefficients(numbers, 5, K, LENGTHS)
    total = tl.zeros([LENGTHS, COLUMNS], ACC)
    for n in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, c)):
        row = tl.cast(n, tl.int32)
        i = i0 + row
        rho_i = tl.load(rho + tl.arange(0, LENGTHS) * c + row, mask=tl.arange(0, LENGTHS) < K, other=0)
        s_i, g_pos = row_result(results, 0, row, c, K, LENGTHS), row_result(results, 1, row, c, K, LENGTHS)
        f_i, top = row_result(results, 2, row, c, K, LENGTHS), row_result(results, 3, row, c, K, LENGTHS)
        pos = positive_of(positives, i, i < B, N)
        threshold = None
        if exclude is not None:
            threshold = threshold_of(s_i, exclude, i, i < B, EXCLUDE_BY)
        t_row = None
        guide_bound = None
        if T is not None:
            t_row = T + row.to(tl.int64) * ld_T
            t_pos = tl.load(t_row + pos, mask=pos >= 0, other=0).to(ACC)
            guide_bound = threshold_of(t_pos, guide_above, i, i < B, GUIDE_BY)
        raw, r = tile(S, r2, rho_i, row, j, step, ld, N, K, LENGTHS)
        s = raw * r
        l = logits(s, j, i, pos, threshold, T, t_row, guide_bound, q, b, query_ids, key_ids, own_b, own_c, B, N, LINEAR)
        G = tl.exp2(l - top[:, None]) * f_i[:, None] * derivative(s, q[:, None], slope[:, None], LINEAR) * r
        G = tl.where(j[None, :] == pos, g_pos[:, None], G)
        total += G * raw
        at = k.to(tl.int64) * step + row.to(tl.int64) * ld + j[None, :]
        tl.store(S + at, tl.cumsum(G, 0, reverse=True).to(S.dtype.element_ty), mask=inside)
    at = (chunk.to(tl.int64) * K + k) * N + j[None, :]
    tl.store(columns + at, total, mask=inside)
