"""Launches the kernels of kernels/triton for the panel driver. Nothing here waits for the device."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pycse.backends.interpreter import interpreted
from pycse.backends.triton.norms import block_of, on_device_of, warps_of
from pycse.backends.triton.positives import Positives
from pycse.kernels.triton import contrastive as row_kernels
from pycse.kernels.triton import fused, fused_symmetric, symmetric
from pycse.logits import Coefficients
from pycse.panels import contrastive as panel
from pycse.panels import parts
from pycse.problem import Contrastive, Result

# Panels of GEMM tiles go down this many row tiles before the next column tile: all of a panel's 2048 rows (3 MB at
# D = 768 in bf16) stay in L2 while the keys are read once.
GROUP = 16


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int
    copied: bool = False  # operands through tensor descriptors: the hardware copies their tiles (sm_90)


# Tiles of the fused GEMM by operand type and compute capability (at least), largest first: the first that gives every
# multiprocessor a tile is taken, or the last. Bounds: 163 KB of shared memory on sm_80, 99 on sm_86 and sm_89, 227 on
# sm_90; m n / (32 warps) registers for the accumulator beside the operands, without spilling
# (tests/helpers/triton_compile.py).
TILES: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("bf16", 90): (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
    ("bf16", 86): (Tile(128, 128, 32, 8, 4), Tile(64, 64, 64, 4, 4)),
    ("bf16", 80): (Tile(128, 256, 32, 8, 4), Tile(128, 128, 32, 8, 4), Tile(64, 64, 64, 4, 4)),
    ("tf32", 80): (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    ("ieee", 80): (Tile(64, 64, 32, 4, 2),),
}


def tile(kind: str, capability: int, processors: int, c: int, N: int, aligned: bool) -> Tile:
    level = max(least for name, least in TILES if name == kind and least <= max(capability, 80))
    tiles = TILES[kind, level]
    if not aligned:  # element-wise loads hold a tile's operands in registers: the smallest
        return tiles[-1]
    for t in tiles:
        if triton.cdiv(c, t.m) * triton.cdiv(N, t.n) >= processors:
            return t
    return tiles[-1]


@functools.cache
def tensor_descriptor() -> Any:
    """triton.tools' class, or None in a Triton that has none yet."""
    try:
        return importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
    except ImportError:
        return None


def describable(z: Tensor) -> bool:
    """Whether the hardware's copies take z: its rows lie apart and begin at multiples of 16 bytes."""
    aligned = not (z.data_ptr() % 16 or z.stride(0) * z.element_size() % 16)
    return tensor_descriptor() is not None and aligned and z.stride(0) >= z.shape[1]


@functools.cache
def device_properties(device: torch.device) -> tuple[int, int]:
    """Compute capability and multiprocessors; those of an A100 for the interpreter's CPU tensors."""
    if device.type != "cuda":
        return 80, 108
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def dot_kind(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: as PyTorch's own GEMMs are told to for float32."""
    if dtype == torch.bfloat16:
        return "bf16"
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the newer switches are in use, which the older one refuses to summarise
        exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


class Kernels(Positives):
    p: Contrastive

    def __init__(self, p: Contrastive, state: panel.State) -> None:
        super().__init__(p.z1)
        self.p, self.state = p, state
        self.B, self.N = p.B, p.z2.shape[0]
        self.coef = self.number(state.coef, self.B)  # row by row where it is a tensor
        form = p.logit
        # Float arguments of a kernel are float32: as Norms.number, all of them from the device in double precision.
        c = p.coefficients() if p.acc != torch.float64 else form.coefficients_on_device(p.temperature, p.m, p.z1, p.acc)
        c = Coefficients(*c)  # of a tensor its elements, which stay on the device
        self.pos_q, self.pos_b, self.pos_c = c.positive_q, c.positive_b, c.positive_c
        self.q, self.b, self.slope = c.q, c.b, c.slope
        own_b, own_c = form.own
        self.own_b = self.number(own_b) if own_b else None
        self.own_c = self.number(own_c) if form.has_own else None
        self.linear = form.linear
        self.shift = None if p.shift is None else self.number(p.shift / math.log(2))
        self.exclude: float | Tensor | None = None
        if p.exclude_each is not None:
            self.exclude = p.exclude_each.to(p.acc).contiguous()
        elif p.exclude_above is not None:
            self.exclude = self.number(p.exclude_above, self.B)
        self.guide_above = self.number(p.guide_above, self.B) if p.guided else None
        self.block = block_of(self.N)
        self.s_ii = self.new(self.B) if state.sums is not None else None

    def _fuses(self) -> bool:
        """Whether rows, columns and gradients are epilogues of the GEMM that makes S. An epilogue sees a tile at a
        time: not the row's maximum (a shift must bound the logits), nor a bound from its positive, and sums for the
        gradients of the coefficients would be two more."""
        p = self.p
        if self.shift is None or p.excludes or p.guided or p.trained or p.in_parts or p.acc == torch.float64:
            return False
        # The interpreter's tl.dot misreads bfloat16; a GPU's tl.dot in full float32 has no tensor cores and is no match
        # for cuBLAS.
        return dot_kind(p.z1.dtype) != ("bf16" if interpreted() else "ieee")

    def _plan(self, z1hat: Tensor) -> tuple[int, int, tuple[Any, Any], tuple[int, ...], dict[str, Any]]:
        """The fused GEMM's tiles down and along a panel; its operands; D and strides; what every launch of it takes."""
        z2 = self.p.z2
        (c, D), N = z1hat.shape, self.N
        kind = dot_kind(z2.dtype)
        strides = z1hat.stride(0), z2.stride(0)
        t = tile(kind, *device_properties(z2.device), c, N, aligned=not any(n % 16 for n in (D, *strides)))
        options = dict(
            LINEAR=self.linear, PRECISION="tf32" if kind == "tf32" else "ieee", WHOLE=D % t.k == 0,
            BLOCK_M=t.m, BLOCK_N=t.n, BLOCK_K=t.k, GROUP=GROUP, num_warps=t.warps, num_stages=t.stages,
            enable_fp_fusion=True,  # an epilogue is counted in instructions; Triton 3.10 will not fuse unasked
        )  # fmt: skip
        operands: tuple[Any, Any] = z1hat, z2
        if t.copied and describable(z1hat) and describable(z2):
            descriptor = tensor_descriptor()
            operands = descriptor.from_tensor(z1hat, [t.m, t.k]), descriptor.from_tensor(z2, [t.n, t.k])
        return triton.cdiv(c, t.m), triton.cdiv(N, t.n), operands, (D, *strides), options

    def fused_rows(self, z1hat: Tensor, S: Tensor, i0: int, grad: bool) -> Tensor | None:
        if not self._fuses():
            return super().fused_rows(z1hat, S, i0, grad)
        p, out, c = self.p, self.state, z1hat.shape[0]
        down, along, operands, sizes, options = self._plan(z1hat)
        partial, s_pos = self.new(along, c), self.new(c)
        f = self.new(c) if grad else None
        G = S if grad else None
        fused.fused_rows[(down * along,)](
            *operands, G, out.r2, p.positives, p.query_ids, p.key_ids, partial, s_pos, self.q, self.b, self.slope,
            self.own_b, self.own_c, self.shift, i0, c, self.B, self.N, *sizes, S.stride(0), **options,
        )  # fmt: skip
        fused.finish_rows[(triton.cdiv(c, 32),)](
            partial, s_pos, G, out.r2, p.positives, self.coef, out.loss, f, self.pos_q, self.pos_b, self.pos_c,
            self.shift, i0, c, self.N, S.stride(0), along, LINEAR=self.linear, ROWS=32, TILES=32, num_warps=4,
        )  # fmt: skip
        return f

    def fused_sums(self, z1hat: Tensor, S: Tensor, i0: int) -> None:
        if not self._fuses():
            return super().fused_sums(z1hat, S, i0)
        p, out, c, sums = self.p, self.state, z1hat.shape[0], self.state.sums
        assert sums is not None
        down, along, operands, sizes, options = self._plan(z1hat)
        rows, columns = self.new(along, c), self.new(down, self.N)
        fused_symmetric.fused_sums[(down * along,)](
            *operands, out.r2, p.query_ids, p.key_ids, rows, columns, self.s_ii, self.q, self.b, self.shift,
            i0, c, self.N, *sizes, **options,
        )  # fmt: skip
        fused_symmetric.finish_sums[(triton.cdiv(self.N, 32),)](
            rows, columns, self.s_ii, out.loss, sums.lpos, sums.lneg, sums.column_max, sums.column_sum,
            self.pos_q, self.pos_b, self.pos_c, self.shift, i0, c, self.N, down, along,
            LINEAR=self.linear, ROWS=32, TILES=32, num_warps=4,
        )  # fmt: skip

    def keeps_similarities(self) -> bool:
        return not self._fuses()

    def fused_symmetric(self, z1hat: Tensor, S: Tensor, i0: int) -> None:
        if not self._fuses():
            return super().fused_symmetric(z1hat, S, i0)
        p, out, c, sums = self.p, self.state, z1hat.shape[0], self.state.sums
        assert sums is not None
        down, along, operands, sizes, options = self._plan(z1hat)
        fused_symmetric.fused_gradients[(down * along,)](
            *operands, S, out.r2, p.query_ids, p.key_ids, self.coef, sums.lpos, sums.lneg, sums.lneg_column,
            sums.lse_column, self.pos_q, self.pos_b, self.q, self.b, self.slope, self.shift, i0, c, self.N, *sizes,
            S.stride(0), **options,
        )  # fmt: skip

    def rows(self, S: Tensor, i0: int, grad: bool) -> Tensor | None:
        p, out = self.p, self.state
        f = self.new(S.shape[0]) if grad else None
        sums = out.sums
        T = out.T
        row_kernels.rows[(S.shape[0],)](
            S, out.r2, out.s_pos, p.positives, p.query_ids, p.key_ids, self.exclude, T, self.guide_above,
            self.coef, out.loss, None if sums is None else sums.lpos, None if sums is None else sums.lneg,
            out.dlogit if grad else None, f,
            self.pos_q, self.pos_b, self.pos_c, self.q, self.b, self.slope, self.own_b, self.own_c, self.shift,
            i0, self.B, self.N, S.stride(0), 0 if T is None else T.stride(0),
            LINEAR=self.linear, EXCLUDE_BY=p.exclude_by, GUIDE_BY=p.guide_by, BLOCK=self.block,
            num_warps=warps_of(self.block),
        )  # fmt: skip
        return f

    def positives(self, z1hat: Tensor, i0: int) -> None:
        if not self._fuses():  # there the tile that holds the positive knows it in full precision
            super().positives(z1hat, i0)

    def columns(self, S: Tensor, i0: int) -> None:
        p, out, sums = self.p, self.state, self.state.sums
        assert sums is not None
        width = 64  # columns of a program: 128 bytes of a bf16 row
        symmetric.columns[(triton.cdiv(self.N, width),)](
            S, out.r2, p.query_ids, p.key_ids, out.s_pos, self.exclude, sums.column_max, sums.column_sum,
            self.q, self.b, self.shift, i0, S.shape[0], self.N, S.stride(0),
            LINEAR=self.linear, EXCLUDE_BY=p.exclude_by, ROWS=32, COLUMNS=width, num_warps=4,
        )  # fmt: skip

    def symmetric(self, S: Tensor, i0: int) -> None:
        p, out, sums = self.p, self.state, self.state.sums
        assert sums is not None
        symmetric.symmetric[(S.shape[0],)](
            S, out.r2, p.query_ids, p.key_ids, self.exclude, self.coef, out.s_pos, sums.lpos, sums.lneg,
            sums.lneg_column, sums.lse_column, out.dlogit, self.pos_q, self.pos_b, self.q, self.b, self.slope,
            i0, self.N, S.stride(0),
            LINEAR=self.linear, EXCLUDE_BY=p.exclude_by, BLOCK=self.block, num_warps=warps_of(self.block),
        )  # fmt: skip


def contrastive(p: Contrastive) -> Result:
    with on_device_of(p.z1):
        return (parts if p.in_parts else panel).contrastive(p, Kernels)
