"""Every GPU kernel once on small ragged shapes, for compute-sanitizer: ``python -m benchmarks.gpu --exercise``."""

from __future__ import annotations

import functools
import importlib
import traceback
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_parts import Plan, replaced, routes
from pycse import fused_distillcse, fused_focal_infonce, uniformity
from pycse.panels import contrastive as panel
from pycse.pattern import Pattern


def exercise(plan: Plan) -> int:
    """Returns how many cases failed."""
    g = torch.Generator().manual_seed(0)
    new = lambda *n: torch.randn(*n, generator=g).to(plan.dtype).to(plan.device)  # noqa: E731
    leaf = lambda *n: new(*n).requires_grad_()  # noqa: E731
    at = lambda t: t.to(plan.device)  # noqa: E731
    ids = {"query_ids": at(torch.arange(68) // 2), "key_ids": at(torch.arange(136) % 9)}
    contrastive: list[dict[str, Any]] = [
        {},
        {**ids, "hard_negative_weight": 0.5, "positives": at(torch.arange(68) + 3)},
        {"exclude_above": 0.1, "temperature": 0.01},
        {"symmetric": True},
        {"symmetric": True, "exclude_above": 0.1},
        {"temperature": torch.full((), 0.05, device=plan.device, requires_grad=True)},
    ]
    distillations: list[dict[str, Any]] = [{}, {"shuffle": "expected"}, {"group_size": 8, "divergence": "js"}]
    failed = 0

    def attempt(what: str, call: Callable[[], Any]) -> None:
        nonlocal failed
        try:
            call()
            if not plan.dry:
                torch.cuda.synchronize()
        except Exception:  # a launch that the sanitizer's tools leave no room for, say: the other kernels still run
            traceback.print_exc()
            print(f"{what}: FAILED", flush=True)
            failed += 1

    def loss(name: str, B: int, N: int, D: int, **options: Any) -> None:
        fused_focal_infonce(leaf(B, D), leaf(N, D), backend=name, **options).backward()

    def products(name: str, block: int) -> None:
        sparse = importlib.import_module(f"pycse.backends.{name}.sparse")
        mask = torch.rand(128 // block, 192 // block, generator=g) < 0.4
        pattern = Pattern.from_mask(at(mask.repeat_interleave(block, 0).repeat_interleave(block, 1)), block)
        x, w, dy = new(1100, 192), new(128, 192), new(1100, 128)  # so many that dw is made in parts
        sparse.linear(x, w, None, pattern), sparse.dx(dy, w, pattern), sparse.dw(dy, x, pattern)

    for name in plan.usable():
        for route, settings in routes(name).items():
            for options in contrastive:
                with settings(), replaced(panel, "panel_rows", lambda B, *_: min(B, 48)):
                    N = 68 if "symmetric" in options else 136
                    attempt(f"{route} {list(options)}", functools.partial(loss, name, 68, N, 40, **options))
            if "fused" in route:  # more steps than its pipeline holds, and tiles
                with settings():
                    attempt(f"{route}, long", functools.partial(loss, name, 300, 520, 328))
        if name == "triton":  # its largest tile, loaded and copied, which such small problems do not take
            backend = importlib.import_module("pycse.backends.triton.contrastive")
            largest = backend.tile("bf16", *backend.device_properties(plan.device), 1 << 16, 1 << 16, aligned=True)
            for tile in (largest, largest._replace(copied=True)):
                with replaced(backend, "tile", lambda *_, t=tile, **__: t):
                    attempt(f"triton, {tile}", functools.partial(loss, name, 130, 520, 64))
        for options in distillations:
            z1, z2, seed = leaf(130, 40), leaf(130, 40), torch.tensor(3, device=plan.device)
            call = functools.partial(fused_distillcse, z1, z2, [new(130, 24)], seed=seed, backend=name, **options)
            attempt(f"{name} distillation {list(options)}", lambda call=call: call().loss.backward())  # type: ignore[misc]
        attempt(f"{name} uniformity", lambda name=name: uniformity(leaf(130, 40), backend=name).backward())  # type: ignore[misc]
        for block in (1, 16, 64):
            attempt(f"{name} sparse products, {block}", functools.partial(products, name, block))
    print(f"{', '.join(plan.usable())}: every kernel ran" if not failed else f"{failed} cases failed")
    for name, reason in plan.missing().items():
        print(f"{name}: {reason}")
    return failed
