"""Normalisation and its gradient, a few rows to a program.

    r_i = 1 / |z_i|  (0 where |z_i| <= 1e-12),   zhat_i = r_i z_i     out_i = factor zhat_i (factor 1 where None)
    dz_i = k_i (g_i - zhat_i <zhat_i, g_i>)      g = dL/dzhat in units of f (1 where None) and k = r f;
                                                 or g already carries r (scaled), and k = f where r != 0
z, g and the results out, dz (n, D) with row strides ld; r (n,) in the accumulation type. ``project`` may
write over g. Stored: the results only.
"""

import triton
import triton.language as tl
from pycse.kernels.triton.logit import number

TINY_NORM = tl.constexpr(1e-12)


@triton.jit
def normalize(z, r, out, factor, n, D, ld, ld_out, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (i < n)[:, None]
    z += i.to(tl.int64)[:, None] * ld
    squares = tl.zeros([ROWS, BLOCK], ACC)
    for a in range(0, D, BLOCK):
        d = a + tl.arange(0, BLOCK)[None, :]
        x = tl.load(z + d, mask=inside & (d < D), other=0).to(ACC)
        squares += x * x
    square = tl.sum(squares, 1)
    length = tl.sqrt(square)
    inv = 1.0 / length
    # Squares that leave float's range: by the row's largest entry.
    if tl.max(((square <= 1e-30) | (square >= 1e30)).to(tl.int32), 0) > 0:
        largest = tl.zeros([ROWS, BLOCK], ACC)
        for a in range(0, D, BLOCK):
            d = a + tl.arange(0, BLOCK)[None, :]
            x = tl.load(z + d, mask=inside & (d < D), other=0).to(ACC)
            largest = tl.maximum(largest, tl.abs(x))
        top = tl.max(largest, 1)
        top = tl.where(top > 0, top, 1.0)
        squares = tl.zeros([ROWS, BLOCK], ACC)
        for a in range(0, D, BLOCK):
            d = a + tl.arange(0, BLOCK)[None, :]
            x = tl.load(z + d, mask=inside & (d < D), other=0).to(ACC) / top[:, None]
            squares += x * x
        root = tl.sqrt(tl.sum(squares, 1))
        length = top * root
        inv = (1.0 / top) / root
    inv = tl.where(length <= TINY_NORM, 0.0, inv)
    if r is not None:
        tl.store(r + i, inv, mask=i < n)
    if out is not None:
        if factor is not None:
            inv *= number(factor, ACC)
        out += i.to(tl.int64)[:, None] * ld_out
        for a in range(0, D, BLOCK):
            d = a + tl.arange(0, BLOCK)[None, :]
            x = tl.load(z + d, mask=inside & (d < D), other=0).to(ACC) * inv[:, None]
            tl.store(out + d, x.to(out.dtype.element_ty), mask=inside & (d < D))


@triton.jit
def project(
    z, g, r, f, out, n, D, ld, ld_g, ld_out,
    SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = r.dtype.element_ty
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (i < n)[:, None]
    z += i.to(tl.int64)[:, None] * ld
    g += i.to(tl.int64)[:, None] * ld_g
    out += i.to(tl.int64)[:, None] * ld_out
    r_i = tl.load(r + i, mask=i < n, other=0)[:, None]
    dots = tl.zeros([ROWS, BLOCK], ACC)
    for a in range(0, D, BLOCK):
        d = a + tl.arange(0, BLOCK)[None, :]
        unit = tl.load(z + d, mask=inside & (d < D), other=0).to(ACC) * r_i
        dots += unit * tl.load(g + d, mask=inside & (d < D), other=0).to(ACC)
    along = tl.sum(dots, 1)[:, None]
    if SCALED:
        factor = tl.where(r_i != 0, 1.0, 0.0).to(ACC)
    else:
        factor = r_i
    f_i = tl.full((), 1.0, ACC)
    if f is not None:
        f_i = tl.load(f + i, mask=i < n, other=0)[:, None]
    tl.debug_barrier()  # g is read to its end before it may be written over
    for a in range(0, D, BLOCK):
        d = a + tl.arange(0, BLOCK)[None, :]
        unit = tl.load(z + d, mask=inside & (d < D), other=0).to(ACC) * r_i
        x = f_i * (tl.load(g + d, mask=inside & (d < D), other=0).to(ACC) - along * unit)
        x *= factor  # last: f may be as small as r is
        tl.store(out + d, x.to(out.dtype.element_ty), mask=inside & (d < D))
