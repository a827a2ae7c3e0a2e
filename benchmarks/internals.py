"""Where benchmarks reach behind pycse's public functions, and nowhere else: row kernels alone, where the profile's
clocks are set, what the tuner turns."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pycse
from benchmarks.formulas import TAU, M

Setting = Callable[[], contextlib.AbstractContextManager[Any]]  # within it, something is done in another way


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# --- row kernels alone


class _Seen(Exception):
    pass


def problem_of(op: str, call: Callable[[], object]) -> Any:
    """What a public function hands to the CPU backend's operator ``op``."""
    problems: list[Any] = []

    def keep(problem: Any) -> None:
        problems.append(problem)
        raise _Seen

    with replaced(importlib.import_module(f"pycse.backends.cpu.{op}"), op, keep), contextlib.suppress(_Seen):
        call()
    return problems[0]


def contrastive_rows(S: Tensor) -> tuple[Callable[[Tensor], Tensor | None], Tensor]:
    """Focal-InfoNCE's row kernel as a function of its panel, and where it leaves the losses."""
    from pycse.backends.cpu.contrastive import Kernels
    from pycse.panels.contrastive import State

    c, N = S.shape
    z1, z2 = (torch.ones(n, 1, dtype=S.dtype, requires_grad=True) for n in (c, N))
    problem = problem_of(
        "contrastive", lambda: pycse.fused_focal_infonce(z1, z2, TAU, M, reduction="sum", backend="cpu")
    )
    state = State(r2=torch.ones(N), coef=1.0, loss=torch.empty(c))
    if S.dtype == torch.bfloat16:
        state.s_pos = S.detach().diagonal().float().contiguous()
    kernels = Kernels(problem, state)
    return lambda panel: kernels.rows(panel, 0, True), state.loss


def distill_rows(S: Tensor, T: Tensor, shuffle: str, coef: float) -> tuple[Callable[[Tensor], None], Tensor]:
    """The same of the distillation, whose teachers' panel is T."""
    from pycse.backends.cpu.distill import Kernels
    from pycse.panels.distill import State

    c, N = S.shape
    z, teacher = torch.ones(N, 1, requires_grad=True), torch.ones(N, 1)
    options: dict[str, Any] = {"shuffle": shuffle, "seed": 1, "reduction": "sum", "backend": "cpu"}
    problem = problem_of("distill", lambda: pycse.fused_distill(z, [teacher], **options))
    state = State(coef, torch.empty(N))
    kernels = Kernels(problem, state)
    return lambda panel: kernels.rows(panel, T, 0, True), state.loss[:c]


# --- the stages of a call on the CPU


def stages() -> list[tuple[Any, str, str]]:
    """Owner and name of the functions on the way of a call, each with what its time is called."""
    from pycse.kernels import native

    module = lambda name: importlib.import_module(f"pycse.{name}")  # noqa: E731
    compiled = {"small": "one native call", "rows": "row kernel", "normalize": "norms", "project": "projection"}
    return [
        *((native(), name, stage) for name, stage in compiled.items()),
        (module("validation"), "contrastive", "validation"),
        (module("ops.fused").Fused, "__call__", "operator, autograd.Function"),
        (module("ops.contrastive"), "compute", "the problem's description"),
        (module("backends.cpu.contrastive"), "contrastive", "backend: allocation, page faults, panels"),
    ]


# --- what the tuner turns


def panels(c: int) -> contextlib.AbstractContextManager[None]:
    """Contrastive problems in panels of c rows."""
    return replaced(importlib.import_module("pycse.panels.contrastive"), "panel_rows", lambda B, *_: min(B, c))


def routes(backend: str) -> dict[str, Setting]:
    """The ways that a backend has for a contrastive problem, each with what makes it take this one."""
    if backend != "cuda":
        return {backend: contextlib.nullcontext}
    module = importlib.import_module("pycse.backends.cuda.contrastive")

    @contextlib.contextmanager
    def by_panels(fused: int) -> Iterator[None]:
        with replaced(module, "fits", lambda p: False), replaced(module, "FUSED", fused):
            yield

    ways = {"cuda, panels": 0, "cuda, fused": 1, "cuda, fused in clusters": 2}
    return {"cuda": contextlib.nullcontext} | {way: partial(by_panels, fused) for way, fused in ways.items()}


def largest_tiles() -> dict[str, Setting]:
    """Triton's largest tile of a bf16 product here, loaded and copied, also for problems that would take a smaller."""
    module = importlib.import_module("pycse.backends.triton.contrastive")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tile = module.tile("bf16", *module.device_properties(device), 1 << 16, 1 << 16, aligned=True)
    return _tiles(module, [tile, tile._replace(copied=True)])


def triton_alternatives() -> dict[str, dict[str, Setting]]:
    """What -> its values: how Triton's kernels may compute the largest contrastive problem, or ("sparse tiles") a
    sparse layer in 16 bits. {} without Triton."""
    if importlib.util.find_spec("triton") is None:
        return {}
    module = importlib.import_module("pycse.backends.triton.contrastive")
    sparse = importlib.import_module("pycse.backends.triton.sparse")
    fuses = {"fused": module.Kernels._fuses, "separate": lambda self: False}
    tiles = [
        module.Tile(*sizes)
        for sizes in (
            (128, 256, 64, 8, 4),
            (128, 256, 64, 8, 3),
            (256, 128, 64, 8, 4),
            (128, 128, 64, 4, 3),  # two on a multiprocessor: one's epilogue runs beside the other's product
            (128, 128, 64, 8, 3),
            (128, 128, 128, 8, 3),
            (64, 256, 64, 4, 2),
        )
    ]
    wide, tokens = (128, 64, 64), (128, 256)
    sparse_tiles = [sparse.Tile(t, *wide, warps, stages) for t, warps in zip(tokens, (4, 8)) for stages in (3, 2)] + [
        sparse.Tile(64, *wide, 4, 4)
    ]
    return {
        "tiles": _tiles(module, [*tiles, *(t._replace(copied=True) for t in tiles[:5])]),
        "row tiles to a group": {str(n): partial(replaced, module, "GROUP", n) for n in (4, 8, 16, 32)},
        "epilogue": {label: partial(replaced, module.Kernels, "_fuses", value) for label, value in fuses.items()},
        "sparse tiles": {
            str(tuple(t)): partial(replaced, sparse, "TILES", {**sparse.TILES, "16": t}) for t in sparse_tiles
        },
    }


def _tiles(module: Any, tiles: list[Any]) -> dict[str, Setting]:
    return {str(tuple(t)): partial(replaced, module, "tile", lambda *_, t=t, **__: t) for t in tiles}
