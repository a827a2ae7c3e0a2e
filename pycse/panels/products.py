"""Products of panels: PyTorch's, which a backend may replace; on a GPU also how many rows a panel has, how its rows are
laid out, and how sums of products stay in float32."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pycse.panels.norms import Norms

PANEL_BYTES = 1 << 30  # of a panel, at most
LEAST_ROWS = 1024  # a panel is a dozen launches; below, a product of it does not fill the multiprocessors
ROUND_ROWS = 128  # a tile of the products
KEY_BLOCK = 4096  # keys of one product with transposed keys on a CPU: keeps MKL's packing buffers small
ROUND_BYTES = 128  # of a panel's row: what a transaction, and the hardware that copies tiles, ask for


def panel_rows(B: int, N: int, D: int, itemsize: int) -> int:
    """c on a GPU, from its traffic. A panel of c x N numbers is written once and read twice, 3 N itemsize bytes a row;
    the sum of key gradients is read and written once a panel, 8 N D bytes. c makes the second half of the first (2048
    for D = 768 in 16 bits), and the panels of a call equal."""
    c = max(LEAST_ROWS, math.ceil(8 * D / (0.5 * 3 * itemsize)))
    c = max(ROUND_ROWS, min(c, PANEL_BYTES // max(1, N * itemsize)))
    panels = max(1, round(B / c))
    c = math.ceil(math.ceil(B / panels) / ROUND_ROWS) * ROUND_ROWS
    return max(1, min(B, c))


def row_stride(N: int, device: torch.device, itemsize: int) -> int:
    """From one row of a panel to the next: on a GPU rows begin at whole transactions."""
    if device.type != "cuda":
        return N
    step = ROUND_BYTES // itemsize
    return -(-N // step) * step


@functools.cache
def sums_in_float32(device: torch.device) -> bool:
    """Whether PyTorch adds a product of 16-bit matrices to a float32 sum there without rounding it: on CUDA, since
    about 2.9."""
    if device.type != "cuda":
        return False
    a, total = (torch.zeros(16, 16, dtype=t, device=device) for t in (torch.bfloat16, torch.float32))
    try:
        torch.mm(a, a, out_dtype=torch.float32, out=total)
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return True


class Products(Norms):
    """PyTorch's GEMMs."""

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """out = a b."""
        N = b.shape[1]
        if b.device.type != "cpu" or b.dtype == torch.bfloat16 or N <= 2 * KEY_BLOCK or b.stride(0) != 1:
            return torch.mm(a, b, out=out)
        for j in range(0, N, KEY_BLOCK):
            torch.mm(a, b[:, j : j + KEY_BLOCK], out=out[:, j : j + KEY_BLOCK])
        return out

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a b. Of 16-bit factors in one pass where that is possible: otherwise the product is rounded, written
        and read once more."""
        if total.dtype == a.dtype:
            total.addmm_(a, b)
        elif sums_in_float32(total.device):
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            total.add_(torch.mm(a, b))
