"""Alignment of pairs, a few rows at a time so that they stay in cache: |xhat - yhat|^2 and its gradients, O(c D)
memory."""

from __future__ import annotations

import torch

from pycse.panels.norms import Norms
from pycse.problem import Alignment, Result

PANEL_BYTES = 1 << 20  # of the normalised rows of one side
GPU_PANEL_BYTES = 64 << 20  # launches cost more there than a trip to memory


def alignment(p: Alignment, k: Norms) -> Result:
    x, y = p.x, p.y
    B, D = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    new = lambda *shape: torch.empty(shape, dtype=acc, device=x.device)  # noqa: E731
    dx = k.empty(B, D, dtype=x.dtype) if p.needs[0] else None
    dy = k.empty(B, D, dtype=x.dtype) if p.needs[1] else None
    c = min(B, max(1, (GPU_PANEL_BYTES if x.is_cuda else PANEL_BYTES) // (D * acc.itemsize)))
    losses, f = new(B), new(2, c)
    f[0], f[1] = 2 / B, -2 / B
    xhat, yhat, r_x, r_y = new(c, D), new(c, D), new(c), new(c)
    for i0 in range(0, B, c):
        rows = slice(i0, i0 + c)
        n = x[rows].shape[0]
        sides = ((x[rows], xhat[:n], r_x[:n]), (y[rows], yhat[:n], r_y[:n]))
        for z, zhat, r in sides:
            if p.normalize:
                k.normalize(z if z.dtype == acc else z.to(acc), r, zhat)
            else:
                zhat.copy_(z)
        difference = sides[0][1].sub_(sides[1][1])
        losses[rows] = torch.linalg.vecdot(difference, difference)
        for sign, dz, (z, _, r) in zip(f, (dx, dy), sides):
            if dz is None:
                continue
            if p.normalize:
                k.project(z, difference, r, dz[rows], sign[:n])
            else:
                torch.mul(difference, sign[:n, None], out=dz[rows])
    loss = losses.sum(dtype=torch.float64).div(B).to(acc)
    return Result(losses, dx, dy, loss=loss)
