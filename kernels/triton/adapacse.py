"""The row kernel of AdapACSE, an adaptive angular margin: turns a panel of raw products into losses and gradients, one
program a row.

Symbols (kernels/README.md), panel of c rows from row i0:
    S (c, N)   S_ij = z1hat_i . z2_j, in z's type      r2 (N,) inverse norms of the keys      s_ij = S_ij r2_j
    T (c, N)   a teacher's averaged cosines, alpha_ij those within [-1, 1];    u_ij = m (1 - alpha_ij) / 2
    c_ij = s + 2 sin(u) (rho cos(u) - s sin(u))        cos(theta - 2 u) where theta > m, s < cos(m); else s
    c'   = 1 - 2 sin(u) (sin(u) + s cos(u) / max(rho, LEAST_SINE)),    rho = sqrt(1 - s^2)
    L_i  = log(1 + sum_neg exp(b (c_ij - s_ip)))
    G_ij = e_ij b c' r2_j                      negatives, in units of f_i = coef_i / z_i, e_ij = exp2(b c - shift_i)
    G_ip = -z_neg,i b r2_p                     the positive
    dlogit (B,): dL/db = f (sum_neg e c - z_neg s_ip)
Key ``positives`` [i] is row i's positive (None: i), with s_pos (B,) in place of its rounded s where given; a row whose
positive is no key is NaN. A key that is no negative has u = 0. Logits and ``shift`` are in bits.
Stored: loss; with f (c,) given also G over S, f and optionally dlogit. Memory: O(1) beyond that. One visit where
``shift`` bounds the logits; where it is None a visit for the row's maximum goes before.
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import BIT, number, number_at, positive_cosine, positive_of, resolved, row_results

LEAST_SINE = tl.constexpr(2.0**-10)  # pycse/problem.py


@triton.jit
def half_angle(u):
    """sin(u) and cos(u) of u in [0, pi/2], polynomials in u^2: minimax as kernels/cpu/adapacse.h has them (5e-9), in
    double precision Taylor's (3e-16)."""
    v = u * u
    if u.dtype == tl.float64:
        y = v * 0.0 - 8.22063524662433e-18
        y = y * v + 2.8114572543455206e-15
        y = y * v - 7.647163731819816e-13
        y = y * v + 1.6059043836821613e-10
        y = y * v - 2.505210838544172e-08
        y = y * v + 2.7557319223985893e-06
        y = y * v - 0.0001984126984126984
        y = y * v + 0.008333333333333333
        y = y * v - 0.16666666666666666
        x = v * 0.0 + 4.110317623312165e-19
        x = x * v - 1.5619206968586225e-16
        x = x * v + 4.779477332387385e-14
        x = x * v - 1.1470745597729725e-11
        x = x * v + 2.08767569878681e-09
        x = x * v - 2.755731922398589e-07
        x = x * v + 2.48015873015873e-05
        x = x * v - 0.001388888888888889
        x = x * v + 0.041666666666666664
        x = x * v - 0.5
    else:
        y = v * 2.6089039693e-6 - 1.9811101083e-4
        y = y * v + 8.3330878988e-3
        y = y * v - 1.6666659713e-1
        x = v * -2.6076816084e-7 + 2.4761870009e-5
        x = x * v - 1.3888403773e-3
        x = x * v + 4.1666641831e-2
        x = x * v - 0.5
    return u + u * (v * y), 1.0 + v * x


@triton.jit
def turned(S, T, r2, key_ids, id_i, pos, j, N, half_m, cos_m):
    """Of keys j: which are negatives, r, c and c'."""
    ACC: tl.constexpr = r2.dtype.element_ty
    negative = (j < N) & (j != pos)
    if key_ids is not None:
        negative = negative & (tl.load(key_ids + j, mask=j < N, other=0) != id_i)
    r = tl.load(r2 + j, mask=j < N, other=0)
    s = tl.load(S + j, mask=j < N, other=0).to(ACC) * r
    alpha = tl.load(T + j, mask=j < N, other=1).to(ACC)
    alpha = tl.where(alpha > 1, 1.0, alpha)  # a NaN stays
    alpha = tl.where(alpha < -1, -1.0, alpha)
    sin, cos = half_angle(tl.where(negative, half_m * (1 - alpha), 0.0))
    square = (1 - s) * (1 + s)
    rho = tl.sqrt(tl.where(square > 0, square, 0.0))
    twice = tl.where(s < cos_m, 2 * sin, 0.0)
    least = tl.where(rho > LEAST_SINE, rho, LEAST_SINE)
    return negative, r, s + twice * (rho * cos - s * sin), 1 - twice * (sin + s / least * cos)


@triton.jit
def rows(
    S,
    T,
    r2,
    s_pos,
    positives,
    query_ids,
    key_ids,
    coef,
    loss,
    dlogit,
    f,
    b,
    half_m,
    cos_m,
    shift,
    i0,
    B,
    N,
    ld,
    ld_T,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = r2.dtype.element_ty
    k = tl.program_id(0)
    i = i0 + k
    S += k.to(tl.int64) * ld
    T += k.to(tl.int64) * ld_T
    b, half_m, cos_m = number(b, ACC), number(half_m, ACC), number(cos_m, ACC)
    bits = b * BIT
    pos = positive_of(positives, i, i < B, N)
    r_pos = tl.load(r2 + pos, mask=pos >= 0, other=0)
    s_pos = positive_cosine(S, s_pos, i, pos, r_pos)
    id_i = 0
    if query_ids is not None:
        id_i = tl.load(query_ids + i)

    if shift is not None:
        top = number(shift, ACC)
    else:
        best = tl.full([BLOCK], float("-inf"), ACC)
        for a in range(0, N, BLOCK):
            j = a + tl.arange(0, BLOCK)
            negative, _, c, _ = turned(S, T, r2, key_ids, id_i, pos, j, N, half_m, cos_m)
            best = tl.maximum(best, tl.where(negative, c * bits, float("-inf")))
        top = resolved(tl.maximum(tl.max(best, 0), s_pos * bits))

    z = tl.zeros([BLOCK], ACC)
    ec = tl.zeros([BLOCK], ACC)
    for a in range(0, N, BLOCK):
        j = a + tl.arange(0, BLOCK)
        negative, r, c, slope = turned(S, T, r2, key_ids, id_i, pos, j, N, half_m, cos_m)
        e = tl.where(negative, tl.exp2(c * bits - top), 0.0)
        z += e
        if dlogit is not None:
            ec += e * c
        if f is not None:
            tl.store(S + j, (e * (b * slope * r)).to(S.dtype.element_ty), mask=j < N)

    z_neg = tl.sum(z, 0)
    coef_i = number_at(coef, i, i < B, ACC)
    zero = s_pos * 0
    _, loss_i, f_i, g_pos = row_results(z_neg, s_pos, r_pos, top, coef_i, zero, b, zero, True)
    tl.store(loss + i, loss_i)
    if f is not None:
        tl.debug_barrier()  # G at the positive is written last
        tl.store(S + pos, g_pos.to(S.dtype.element_ty), mask=pos >= 0)
        tl.store(f + k, f_i)
        if dlogit is not None:
            tl.store(dlogit + i, f_i * (tl.sum(ec, 0) - z_neg * s_pos))
