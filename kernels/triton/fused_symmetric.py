"""The symmetric loss with its product: rows and columns in the same tiles, S never written.

Symbols and formulas as in symmetric.py and fused.py, for a shift (in bits) that bounds the logits beforehand:
    fused_sums       a tile's sums of e = exp2(l - shift) over its negatives, e_ii = 0:
                     row_part_tk   over row k's keys in column tile t,     column_part_tj   over the rows of row tile t
                     s_ii by the tile that holds it
    finish_sums      z_i = sum_t row_part -> l_ii, lneg_i and the row's half of the loss;   zcol_j += sum_t column_part
    fused_gradients  P_ij = e (row_i + column_j),   row_i = coef_i exp2(shift - lse_i) / 2,
                     column_j = coef_j exp2(shift - lse^c_j) / 2
                     G = P l' r2, complete; at the diagonal P_ii as in symmetric.py
Stored: both parts (tiles, c) and (tiles, N), O(N) beside them, G (c, N) in the second sweep. No atomics: tiles are
summed in a fixed order, panels one after the other.
"""

import triton
import triton.language as tl
from pycse.kernels.triton.fused import COLUMNS, derivative_times, exponent, product, sum_tiles, tile_of
from pycse.kernels.triton.logit import (
    BIT,
    LOG2,
    derivative,
    log_add,
    negatives,
    number,
    number_at,
    row_results,
    sigmoid,
)


@triton.jit
def exponentials(
    S, j0, k0, r2, query_ids, key_ids, q, b, shift, i0, c, N,
    LINEAR: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """s, e, the keys' r and whether a diagonal entry is among rows k0 and columns j0 on; e is 0 at it, at no negatives,
    and outside."""
    k = k0 + tl.arange(0, BLOCK_M)
    inside = (k < c)[:, None]
    i = (i0 + k)[:, None]
    j = (j0 + tl.arange(0, WIDTH))[None, :]
    r = tl.load(r2 + j, mask=j < N, other=0)
    s = S * r
    l = exponent(S, s, r, q, b, shift, LINEAR)
    if query_ids is not None:
        l = negatives(l, s, j, i, i, None, query_ids, key_ids, None, None, N, N, inside)
    e = tl.exp2(l)
    # Most pieces of a tile hold no diagonal and nothing outside: they pay for no mask.
    diagonal = (i0 + k0 < j0 + WIDTH) & (j0 < i0 + k0 + BLOCK_M)
    if diagonal | (j0 + WIDTH > N) | (k0 + BLOCK_M > c):
        e = tl.where(inside & (j < N) & (j != i), e, 0.0)
    return s, e, r, diagonal


@triton.jit
def sums_of(
    S, j0, k0, column_part, s_ii, r2, query_ids, key_ids, q, b, shift, i0, c, N,
    LINEAR: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Stores the columns' sums and s_ii of the WIDTH columns from j0; returns the rows' sums."""
    if WIDTH > COLUMNS:
        left, right = tl.split(tl.permute(tl.reshape(S, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))  # no data moves
        z = sums_of(
            left, j0, k0, column_part, s_ii, r2, query_ids, key_ids, q, b, shift, i0, c, N,
            LINEAR, BLOCK_M, WIDTH // 2,
        )  # fmt: skip
        return z + sums_of(
            right, j0 + WIDTH // 2, k0, column_part, s_ii, r2, query_ids, key_ids, q, b, shift, i0, c, N,
            LINEAR, BLOCK_M, WIDTH // 2,
        )  # fmt: skip
    else:
        j = j0 + tl.arange(0, WIDTH)
        s, e, _, diagonal = exponentials(
            S, j0, k0, r2, query_ids, key_ids, q, b, shift, i0, c, N, LINEAR, BLOCK_M, WIDTH
        )
        if diagonal:
            k = k0 + tl.arange(0, BLOCK_M)
            i = i0 + k
            here = (k < c) & (i >= j0) & (i < j0 + WIDTH)
            tl.store(s_ii + i, tl.sum(tl.where(j[None, :] == i[:, None], s, 0), 1), mask=here)
        tl.store(column_part + j, tl.sum(e, 0), mask=j < N)
        return tl.sum(e, 1)


@triton.jit
def fused_sums(
    z1hat,
    z2,
    r2,
    query_ids,
    key_ids,
    row_part,
    column_part,
    s_ii,
    q,
    b,
    shift,
    i0,
    c,
    N,
    D,
    ld1,
    ld2,
    LINEAR: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    ACC: tl.constexpr = r2.dtype.element_ty
    tile_m, tile_n = tile_of(tl.program_id(0), c, N, BLOCK_M, BLOCK_N, GROUP)
    S = product(z1hat, z2, tile_m, tile_n, c, N, D, ld1, ld2, ACC, PRECISION, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K)
    k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    z = sums_of(
        S, tile_n * BLOCK_N, tile_m * BLOCK_M, column_part + tile_m.to(tl.int64) * N, s_ii, r2, query_ids, key_ids,
        number(q, ACC), number(b, ACC), number(shift, ACC), i0, c, N, LINEAR, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    tl.store(row_part + tile_n.to(tl.int64) * c + k, z, mask=k < c)


@triton.jit
def finish_sums(
    row_part,
    column_part,
    s_ii,
    loss,
    lpos,
    lneg,
    column_max,
    column_sum,
    pos_q,
    pos_b,
    pos_c,
    shift,
    i0,
    c,
    N,
    row_tiles,
    column_tiles,
    LINEAR: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program finishes ROWS rows of the panel and ROWS columns; there are more of these."""
    ACC: tl.constexpr = s_ii.dtype.element_ty
    top = number(shift, ACC)
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)

    inside = k < N
    before = tl.load(column_sum + k, mask=inside, other=0)
    tl.store(column_sum + k, before + sum_tiles(column_part, k, inside, row_tiles, N, ACC, ROWS, TILES), mask=inside)
    tl.store(column_max + k, tl.zeros([ROWS], ACC) + top, mask=inside)

    inside = k < c
    z = sum_tiles(row_part, k, inside, column_tiles, c, ACC, ROWS, TILES)
    s = tl.load(s_ii + i0 + k, mask=inside, other=0)
    l_pos, loss_i, _, _ = row_results(
        z, s, 1.0, top, 1.0, number(pos_q, ACC), number(pos_b, ACC), number(pos_c, ACC), LINEAR
    )
    tl.store(loss + i0 + k, loss_i, mask=inside)
    tl.store(lpos + i0 + k, l_pos * LOG2, mask=inside)
    tl.store(lneg + i0 + k, (tl.log2(z) + top) * LOG2, mask=inside)


@triton.jit
def gradients_of(
    S, j0, k0, row, P_ii, G, r2, query_ids, key_ids, coef, lse_column, pos_q, pos_b, q, b, slope, shift, i0, c, N, ld,
    LINEAR: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Stores G of the WIDTH columns from j0."""
    if WIDTH > COLUMNS:
        left, right = tl.split(tl.permute(tl.reshape(S, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))  # no data moves
        gradients_of(
            left, j0, k0, row, P_ii, G, r2, query_ids, key_ids, coef, lse_column, pos_q, pos_b, q, b, slope, shift,
            i0, c, N, ld, LINEAR, BLOCK_M, WIDTH // 2,
        )  # fmt: skip
        gradients_of(
            right, j0 + WIDTH // 2, k0, row, P_ii, G, r2, query_ids, key_ids, coef, lse_column, pos_q, pos_b, q, b,
            slope, shift, i0, c, N, ld, LINEAR, BLOCK_M, WIDTH // 2,
        )  # fmt: skip
    else:
        j = j0 + tl.arange(0, WIDTH)
        k = k0 + tl.arange(0, BLOCK_M)
        s, e, r, diagonal = exponentials(
            S, j0, k0, r2, query_ids, key_ids, q, b, shift, i0, c, N, LINEAR, BLOCK_M, WIDTH
        )
        lse_j = tl.load(lse_column + j, mask=j < N, other=0) * BIT
        column = 0.5 * number_at(coef, j, j < N, S.dtype) * tl.exp2(shift - lse_j)
        g = e * (row[:, None] + column[None, :]) * derivative_times(r, s, q, slope, LINEAR)
        if diagonal:
            g_ii = derivative(s, (pos_q * P_ii)[:, None], (pos_b * P_ii)[:, None], LINEAR) * r  # P_ii l' r
            g = tl.where(j[None, :] == (i0 + k)[:, None], g_ii, g)
        at = G + k.to(tl.int64)[:, None] * ld + j[None, :]
        tl.store(at, g.to(G.dtype.element_ty), mask=(k < c)[:, None] & (j < N)[None, :])


@triton.jit
def fused_gradients(
    z1hat,
    z2,
    G,
    r2,
    query_ids,
    key_ids,
    coef,
    lpos,
    lneg,
    lneg_column,
    lse_column,
    pos_q,
    pos_b,
    q,
    b,
    slope,
    shift,
    i0,
    c,
    N,
    D,
    ld1,
    ld2,
    ld,
    LINEAR: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    ACC: tl.constexpr = r2.dtype.element_ty
    tile_m, tile_n = tile_of(tl.program_id(0), c, N, BLOCK_M, BLOCK_N, GROUP)
    S = product(z1hat, z2, tile_m, tile_n, c, N, D, ld1, ld2, ACC, PRECISION, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K)
    k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i = i0 + k
    top = number(shift, ACC)
    l_ii = tl.load(lpos + i, mask=k < c, other=0)
    lneg_i = tl.load(lneg + i, mask=k < c, other=0)
    half = 0.5 * number_at(coef, i, k < c, ACC)
    row = half * tl.exp2(top - log_add(lneg_i, l_ii) * BIT)
    lneg_c = tl.load(lneg_column + i, mask=k < c, other=0)
    P_ii = -half * (sigmoid(lneg_i - l_ii) + sigmoid(lneg_c - l_ii))
    gradients_of(
        S, tile_n * BLOCK_N, tile_m * BLOCK_M, row, P_ii, G, r2, query_ids, key_ids, coef, lse_column,
        number(pos_q, ACC), number(pos_b, ACC), number(q, ACC), number(b, ACC), number(slope, ACC), top,
        i0, c, N, ld, LINEAR, BLOCK_M, BLOCK_N,
    )  # fmt: skip
