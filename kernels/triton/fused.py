"""The panel's GEMM with the row kernel as its epilogue, and what completes its rows.

Symbols (kernels/README.md) and formulas as in contrastive.py, for a shift (in bits) that bounds the logits beforehand:
    fused_rows    a tile of S = z1hat z2^T stays in registers: s = S r2, e = exp2(l - shift)
                  G_ij = e l' r2                                       written once, in z's type; the positive 0
                  partial_tk = sum of e over row k's negatives in column tile t,   s_pos,k by the tile that holds it
    finish_rows   z_neg,k = sum_t partial_tk;  loss, f_k and G at the positive
Stored: G (c, N) (not in forward only), partial (tiles, c), s_pos, f (c,), loss (B,). S is never written. No atomics:
tiles are summed in a fixed order. fused_symmetric.py shares the product.
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import (
    BIT,
    logit,
    negatives,
    number,
    number_at,
    positive_of,
    row_results,
)

# Columns of a tile that the epilogue takes at a time: s, e and the keys' norms and ids of a whole tile do not fit in
# registers beside it. 64 spill in a tile of 128 x 256; 16 would store pieces of a 32-byte sector.
COLUMNS = tl.constexpr(32)


@triton.jit
def tile_of(tile, c, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile: down GROUP row tiles, then to the next column, so that the rows' operand stays in
    L2."""
    tiles_m = tl.cdiv(c, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    within = tile % (GROUP * tiles_n)
    return first_m + within % height, within // height


@triton.jit
def product(
    z1hat, z2, tile_m, tile_n, c, N, D, ld1, ld2,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of z1hat z2^T, from pointers or from tensor descriptors, whose tiles the hardware copies. ``WHOLE``:
    BLOCK_K divides D. Rows and columns past the end read real ones again, or zeros."""
    S = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if isinstance(z1hat, tl.tensor):
        k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_K)
        x_at = z1hat + (k % c).to(tl.int64)[:, None] * ld1 + d[None, :]
        y_at = z2 + (j % N).to(tl.int64)[None, :] * ld2 + d[:, None]
        for a in range(0, D, BLOCK_K):
            if WHOLE:
                x = tl.load(x_at)
                y = tl.load(y_at)
            else:
                x = tl.load(x_at, mask=d[None, :] < D - a, other=0)
                y = tl.load(y_at, mask=d[:, None] < D - a, other=0)
            S = tl.dot(x, y, S, input_precision=PRECISION)
            x_at += BLOCK_K
            y_at += BLOCK_K
    else:
        for a in range(0, D, BLOCK_K):
            x = z1hat.load([tile_m * BLOCK_M, a])
            y = z2.load([tile_n * BLOCK_N, a])
            S = tl.dot(x, tl.trans(y), S, input_precision=PRECISION)
    return S


@triton.jit
def exponent(S, s, r, q, b, shift, LINEAR: tl.constexpr):
    """l - shift: one fused multiply-add of S, with b r multiplied once along a column; or two of s."""
    if LINEAR:
        return S * (r * (b * BIT)) - shift
    else:
        return logit(s, q, b, LINEAR) - shift


@triton.jit
def derivative_times(r, s, q, slope, LINEAR: tl.constexpr):
    """l' r, in one fused multiply-add; what is constant along a column is multiplied once."""
    if LINEAR:
        return slope * r
    else:
        return (2.0 * q * r) * s + slope * r


@triton.jit
def epilogue(
    S, j0, k, pos, lowest, highest, G, r2, query_ids, key_ids, s_pos, q, b, slope, own_b, own_c, shift, i0, c, B, N, ld,
    LINEAR: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Stores G and s_pos of the WIDTH columns from j0; returns their sums of e, one a row. The tile's positives are
    between ``lowest`` and ``highest``."""
    if WIDTH > COLUMNS:
        left, right = tl.split(tl.permute(tl.reshape(S, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))  # no data moves
        z = epilogue(
            left, j0, k, pos, lowest, highest, G, r2, query_ids, key_ids, s_pos, q, b, slope, own_b, own_c, shift,
            i0, c, B, N, ld, LINEAR, BLOCK_M, WIDTH // 2,
        )  # fmt: skip
        return z + epilogue(
            right, j0 + WIDTH // 2, k, pos, lowest, highest, G, r2, query_ids, key_ids, s_pos, q, b, slope, own_b,
            own_c, shift, i0, c, B, N, ld, LINEAR, BLOCK_M, WIDTH // 2,
        )  # fmt: skip
    else:
        j = j0 + tl.arange(0, WIDTH)
        inside = k < c
        r = tl.load(r2 + j, mask=j < N, other=0)[None, :]
        s = S * r
        l = exponent(S, s, r, q, b, shift, LINEAR)
        if query_ids is not None or own_c is not None:
            l = negatives(
                l, s, j[None, :], (i0 + k)[:, None], pos[:, None], None, query_ids, key_ids, own_b, own_c, B, N,
                inside[:, None],
            )  # fmt: skip
        e = tl.exp2(l)
        # Most pieces of a tile hold no positive and no column past the end: they pay for no mask.
        positive = (lowest < j0 + WIDTH) & (highest >= j0)
        if positive:
            here = (pos >= j0) & (pos < j0 + WIDTH)
            tl.store(s_pos + k, tl.sum(tl.where(j[None, :] == pos[:, None], s, 0), 1), mask=here)
        if positive | (j0 + WIDTH > N):
            e = tl.where((j[None, :] != pos[:, None]) & (j < N)[None, :], e, 0.0)
        if G is not None:
            at = G + k.to(tl.int64)[:, None] * ld + j[None, :]
            g = e * derivative_times(r, s, q, slope, LINEAR)
            tl.store(at, g.to(G.dtype.element_ty), mask=inside[:, None] & (j < N)[None, :])
        return tl.sum(e, 1)


@triton.jit
def fused_rows(
    z1hat,
    z2,
    G,
    r2,
    positives,
    query_ids,
    key_ids,
    partial,
    s_pos,
    q,
    b,
    slope,
    own_b,
    own_c,
    shift,
    i0,
    c,
    B,
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
    pos = positive_of(positives, i0 + k, k < c, N)
    if positives is None:
        lowest = i0 + tile_m * BLOCK_M
        highest = lowest + BLOCK_M - 1
    else:
        lowest = tl.min(tl.where(pos >= 0, pos, N), 0)
        highest = tl.max(pos, 0)
    z = epilogue(
        S, tile_n * BLOCK_N, k, pos, lowest, highest, G, r2, query_ids, key_ids, s_pos, number(q, ACC), number(b, ACC),
        number(slope, ACC), own_b, own_c, number(shift, ACC), i0, c, B, N, ld, LINEAR, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    tl.store(partial + tile_n.to(tl.int64) * c + k, z, mask=k < c)


@triton.jit
def sum_tiles(partial, k, inside, tiles, c, ACC: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):
    """sum_t partial_tk of ROWS rows k, always in the same order."""
    z = tl.zeros([TILES, ROWS], ACC)
    for a in range(0, tiles, TILES):
        t = a + tl.arange(0, TILES)
        at = partial + t.to(tl.int64)[:, None] * c + k[None, :]
        z += tl.load(at, mask=(t < tiles)[:, None] & inside[None, :], other=0)
    return tl.sum(z, 0)


@triton.jit
def finish_rows(
    partial,
    s_pos,
    G,
    r2,
    positives,
    coef,
    loss,
    f,
    pos_q,
    pos_b,
    pos_c,
    shift,
    i0,
    c,
    N,
    ld,
    tiles,
    LINEAR: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    ACC: tl.constexpr = r2.dtype.element_ty
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = k < c
    i = i0 + k
    z = sum_tiles(partial, k, inside, tiles, c, ACC, ROWS, TILES)
    pos = positive_of(positives, i, inside, N)
    s = tl.where(pos >= 0, tl.load(s_pos + k, mask=pos >= 0, other=0), float("nan"))
    r_pos = tl.load(r2 + pos, mask=pos >= 0, other=0)
    _, loss_i, f_i, g_pos = row_results(
        z, s, r_pos, number(shift, ACC), number_at(coef, i, inside, ACC),
        number(pos_q, ACC), number(pos_b, ACC), number(pos_c, ACC), LINEAR,
    )  # fmt: skip
    tl.store(loss + i, loss_i, mask=inside)
    if G is not None:
        tl.store(f + k, f_i, mask=inside)
        tl.store(G + k.to(tl.int64) * ld + pos, g_pos.to(G.dtype.element_ty), mask=pos >= 0)
