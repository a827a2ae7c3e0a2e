"""The C++ row kernel of kernels/cpu/prefixes.h around the products of products.py."""

from __future__ import annotations

import torch
from torch import Tensor

from pycse.backends.addresses import CODES, pointer
from pycse.backends.cpu.contrastive import native_problem, row_bounds
from pycse.backends.cpu.products import Products
from pycse.kernels import native
from pycse.logits import GRADIENTS
from pycse.panels import prefixes as panel
from pycse.problem import Contrastive

SMALL = {torch.float32: 16 << 20, torch.bfloat16: 4 << 20}  # as contrastive.SMALL


class Kernels(Products, panel.Kernels):
    most = 16  # kMostLengths

    @classmethod
    def small(
        cls, p: Contrastive, dims: list[int], problems: list[Contrastive], weights: list[float]
    ) -> panel.Whole | None:
        """None for embeddings so long that their products might overflow: the panels normalise rows first."""
        (B, D), N, K = p.z1.shape, p.z2.shape[0], len(dims)
        if B * N * dims[-1] > SMALL.get(p.z1.dtype, 0) or p.guided or p.share.total:
            return None
        kernels, code, new, wide = native(), CODES[p.z1.dtype], p.z1.new_empty, torch.float32
        losses, work = new(K, B, dtype=wide), new(kernels.small_prefixes_work_size(K, B, N, dims[-1]), dtype=wide)
        dz1 = new(B, D) if p.needs.z1 else None
        dz2 = new(N, D) if p.needs.z2 else None
        dlogits = new(K, GRADIENTS, B, dtype=wide) if p.trained else None
        coef, bounds = p.row_coefficients(), row_bounds(p)
        coefs = [coef * w for w in weights]  # alive for the kernel
        lengths = [
            native_problem(one, coef, bounds, loss=loss, dlogit=dlogit)
            for one, coef, loss, dlogit in zip(problems, coefs, losses, [None] * K if dlogits is None else dlogits)
        ]
        done = kernels.small_prefixes(
            lengths, dims, code, D, p.z1.data_ptr(), p.z1.stride(0), p.z2.data_ptr(), p.z2.stride(0), p.normalize,
            work.data_ptr(), pointer(dz1), pointer(dz2), torch.get_num_threads(),
        )  # fmt: skip
        return panel.Whole(losses, dz1, dz2, dlogits) if done else None

    def __init__(self, problems: list[Contrastive], states: panel.States) -> None:
        first = problems[0]
        super().__init__(first.z1)
        self.bounds = row_bounds(first)  # alive for the kernels
        self.coefs = [states.coef * w for w in states.weights]
        of = {name: getattr(states, name) for name in ("r2", "s_pos", "loss", "dlogit")}
        self.problems = [
            native_problem(p, coef, self.bounds, **{name: None if x is None else x[k] for name, x in of.items()})
            for k, (p, coef) in enumerate(zip(problems, self.coefs))
        ]

    def visit(
        self, S: Tensor, rho: Tensor, i0: int, t: Tensor | None, columns: Tensor | None, T: Tensor | None
    ) -> None:
        guide = () if T is None else (T.data_ptr(), T.stride(0), CODES[T.dtype])
        native().prefixes(
            self.problems, self.code, S.data_ptr(), S.stride(1), S.stride(0), i0, S.shape[1], rho.data_ptr(),
            pointer(t), pointer(columns), self.threads, t is not None, *guide,
        )  # fmt: skip
