"""A batch whose rows two processes share, in one process: each computes its own, and together they are the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pycse import ops
from pycse.problem import Contrastive, Distillation, Grouping, Share, Sigmoid, Supervised, Uniformity

B, D, CUT = 11, 24, 4
BANDS = {torch.float64: 1e-10, torch.float32: 2e-5}


def problems(dtype: torch.dtype, device: str) -> dict[str, tuple[Any, ...]]:
    """By name; the last is what is called."""
    g = torch.Generator().manual_seed(5)
    new = lambda *n: torch.randn(*n, generator=g, dtype=torch.float64).to(device, dtype)  # noqa: E731
    ids = lambda n: torch.randint(0, 5, (n,), generator=g).to(device)  # noqa: E731
    z1, z2, more = new(B, D), new(B, D), new(3 * B, D)
    unit = torch.nn.functional.normalize
    every: dict[str, Any] = {"temperature": 0.1, "reduction": "sum"}
    own = {"hard_negative_weight": 0.5, "m": 0.3, "form": "focal"}
    return {
        "hard negatives": (Contrastive(z1, more, query_ids=ids(B), key_ids=ids(3 * B), **own, **every),),
        "guided": (Contrastive(z1, z2, guide_queries=unit(new(B, 8)), guide_keys=unit(new(B, 8)), **every),),
        "thresholds": (Contrastive(z1, z2, exclude_each=new(B).float().abs(), **every),),
        "symmetric": (Contrastive(z1, z2, symmetric=True, query_ids=ids(B), key_ids=ids(B), **every),),
        "directions": (Contrastive(z1, more, directions="qd qq dq dd", **every),),
        "supervised": (Supervised(z1, None, 0.1, None, ids(B), reduction="sum"),),
        "sigmoid": (Sigmoid(z1, z2, 8.0, -3.0, reduction="sum"),),
        "distillation": (
            Contrastive(z1, z2, **every),
            Distillation(z1, [new(B, 8)], [1.0], grouping=Grouping("size", 3.0), seed=7, reduction="sum"),
        ),
    }  # fmt: skip


def called(some: tuple[Any, ...], backend: str) -> Tensor:
    p = some[0]
    if len(some) == 2:
        return ops.distill(*some, backend, False)[0]
    of = {Contrastive: ops.contrastive, Supervised: ops.supervised, Sigmoid: ops.sigmoid}
    return of[type(p)](p, backend, False)


def check(name: str, backend: str, dtype: torch.dtype, device: str) -> None:
    """Raises AssertionError where the shares' losses or gradients do not add up to the whole's."""
    some = problems(dtype, device)[name]
    leaves = {n: z for n in ("z1", "z2") if isinstance(z := getattr(some[0], n), Tensor)}

    def result(*shares: Share) -> tuple[Tensor, list[Tensor]]:
        given = {n: z.clone().requires_grad_() for n, z in leaves.items()}
        total = torch.zeros((), dtype=torch.float64, device=device)
        for share in shares:
            placed = [replace(p, share=share, z1=given["z1"]) for p in some]
            if "z2" in given:
                placed[0].z2 = given["z2"]
            keys = name in ("symmetric", "directions", "supervised", "distillation")
            if share.total and not keys:  # rows that are nobody's keys: a process has its own
                placed[0].z1 = given["z1"][share.begin : share.end]
                if placed[0].__dict__.get("guide_queries") is not None:
                    placed[0].guide_queries = some[0].guide_queries[share.begin : share.end]
            total = total + called(tuple(placed), backend)
        total.backward()
        return total.detach(), [z.grad for z in given.values()]

    whole, parts = result(Share()), result(Share(0, CUT, B), Share(CUT, B, B))
    torch.testing.assert_close(parts[0], whole[0], rtol=BANDS[dtype], atol=0)
    for ours, right in zip(parts[1], whole[1], strict=True):
        assert (ours - right).abs().max() <= BANDS[dtype] * right.abs().max(), name


def check_uniformity(backend: str, dtype: torch.dtype, device: str) -> None:
    z = torch.randn(B, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(device, dtype)

    def gradient(*parts: tuple[int, int]) -> tuple[Tensor, Tensor]:
        logs, gradients = [], []
        for a, b in parts:
            own = z[a:b].clone().requires_grad_()
            others = torch.cat((z[:a], z[b:])) if b - a < B else None
            value = ops.uniformity(Uniformity(own, 2.0, others), backend)
            value.backward()
            logs.append(value.detach().double())
            gradients.append(own.grad)
        total = torch.stack(logs).logsumexp(0)
        shares = [(value - total).exp() for value in logs]
        return total, torch.cat([g * s for g, s in zip(gradients, shares)])

    whole, parts = gradient((0, B)), gradient((0, CUT), (CUT, CUT + 1), (CUT + 1, B))
    torch.testing.assert_close(parts[0], whole[0], rtol=BANDS[dtype], atol=BANDS[dtype])
    assert (parts[1] - whole[1]).abs().max() <= BANDS[dtype] * whole[1].abs().max()


NAMES = tuple(problems(torch.float32, "cpu"))
