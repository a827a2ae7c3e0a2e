"""Every GPU kernel once on small ragged shapes, for compute-sanitizer: ``python -m benchmarks.gpu --exercise``."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pycse
from benchmarks import internals, measure
from benchmarks.internals import Setting
from benchmarks.peers import on_backend
from benchmarks.workloads import Workload, inputs

B, N, D = 68, 136, 40
WORKLOADS = [
    *(Workload("distillcse", 130, 40, "bf16", teachers=1, shuffle=shuffle) for shuffle in ("sample", "expected")),
    Workload("uniformity", 130, 40, "bf16"),
    # so many tokens that dw is made in parts
    *(
        Workload("sparse", 1100, 192, "bf16", pattern=pattern, zeros=60, out=128)
        for pattern in ("unstructured", "block16", "block64")
    ),
]
CONTRASTIVE: dict[str, dict[str, Any]] = {
    "plain": {},
    "ids": {
        "query_ids": torch.arange(B) // 2,
        "key_ids": torch.arange(N) % 9,
        "positives": torch.arange(B) + 3,
        "hard_negative_weight": 0.5,
    },
    "exclude_above": {"exclude_above": 0.1, "temperature": 0.01},
    "symmetric": {"symmetric": True},
    "symmetric, exclude_above": {"symmetric": True, "exclude_above": 0.1},
    "temperature": {"temperature": torch.full((), 0.05)},
}


def exercise(backends: list[str], missing: dict[str, str]) -> int:
    """Returns how many cases failed."""
    device, g, failed = measure.device(), torch.Generator().manual_seed(0), 0

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, torch.bfloat16).requires_grad_()

    def attempt(what: str, call: Callable[[], Any], *settings: Setting) -> None:
        nonlocal failed
        try:
            with contextlib.ExitStack() as inside:
                for setting in settings:
                    inside.enter_context(setting())
                call()
                measure.tidy()
        except Exception:  # a launch that the sanitizer's tools leave no room for, say: the other kernels still run
            traceback.print_exc()
            print(f"{what}: FAILED", flush=True)
            failed += 1

    def contrastive(rows: int, keys: int, width: int, **options: Any) -> None:
        for name, value in options.items():
            if isinstance(value, Tensor):
                options[name] = value.to(device, copy=True).requires_grad_(value.is_floating_point())
        pycse.fused_focal_infonce(leaf(rows, width), leaf(keys, width), **options).backward()

    def distillation(backend: str) -> None:
        teachers = [leaf(130, 24).detach()]
        options: dict[str, Any] = {"group_size": 8, "divergence": "js", "seed": torch.tensor(3, device=device)}
        pycse.fused_distillcse(leaf(130, 40), leaf(130, 40), teachers, backend=backend, **options).loss.backward()

    def workload(backend: str, w: Workload) -> None:
        on_backend(backend).build(w, inputs(w, device)).step(True)()

    for name in backends:
        for route, setting in internals.routes(name).items():
            for what, options in CONTRASTIVE.items():
                keys = B if "symmetric" in options else N
                call = partial(contrastive, B, keys, D, backend=name, **options)
                attempt(f"{route}, {what}", call, setting, partial(internals.panels, 48))
            if "fused" in route:  # more steps than its pipeline holds, and tiles
                attempt(f"{route}, long", partial(contrastive, 300, 520, 328, backend=name), setting)
        if name == "triton":  # its largest tile, which such small problems do not take
            for tile, setting in internals.largest_tiles().items():
                attempt(f"triton, {tile}", partial(contrastive, 130, 520, 64, backend=name), setting)
        attempt(f"{name}, distillation in groups of 8", partial(distillation, name))
        for w in WORKLOADS:
            attempt(f"{name}, {w.name}", partial(workload, name, w))
    print(f"{', '.join(backends)}: every kernel ran" if not failed else f"{failed} cases failed")
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    return failed
