"""The baseline of ratios that ``make bench-check`` holds every change against. Numbers in, numbers out.

A ratio is a peer's time over pycse's, both minima of interleaved rounds: larger is better. Times are never compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycse.training.errors import UserError

SCHEMA = 1
FILE = Path(__file__).parent / "baseline.json"
TOLERANCE = 0.15  # how much smaller a ratio may be; docs/performance.md says what it rests on
Ratios = dict[str, dict[str, float]]  # by workload and peer


@dataclass(frozen=True)
class Regression:
    workload: str
    peer: str
    measured: float
    baseline: float

    def __str__(self) -> str:
        worse = 1 - self.measured / self.baseline
        return (
            f"{self.workload}: {self.peer}/pycse is {self.measured:.3f}, baseline {self.baseline:.3f}: "
            f"{worse:.0%} worse, allowed {TOLERANCE:.0%}"
        )


def combined(attempts: list[dict[str, float]], how: Callable[[list[float]], float]) -> dict[str, float]:
    """One ratio a peer out of several attempts at a workload: their median for a baseline, their maximum for the check,
    where a regression has to show in every attempt. Times of different attempts are not mixed: processors change their
    speed."""
    return {peer: how([ratios[peer] for ratios in attempts]) for peer in attempts[0]}


def regressions(measured: Ratios, baseline: Ratios, tolerance: float = TOLERANCE) -> list[Regression]:
    """Where a ratio is smaller than its baseline by more than the tolerance."""
    return [
        Regression(name, peer, ratio, baseline[name][peer])
        for name, of_peers in measured.items()
        for peer, ratio in of_peers.items()
        if not ratio >= baseline[name][peer] * (1 - tolerance)
    ]


def load(path: Path, names: list[str]) -> dict[str, Any]:
    """The baseline in ``path``; it has to know the workloads named."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; make bench-update writes it")
    try:
        baseline = json.loads(path.read_text())
        schema = baseline["schema"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is no baseline; make bench-update writes one") from None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; make bench-update rewrites it")
    if unknown := [name for name in names if name not in baseline["ratios"]]:
        raise UserError(f"{path} does not know {', '.join(unknown)}; make bench-update rewrites it")
    return baseline


def save(path: Path, where: dict[str, str], measured: Ratios) -> None:
    rounded = {name: {peer: round(r, 4) for peer, r in of_peers.items()} for name, of_peers in measured.items()}
    path.write_text(json.dumps({"schema": SCHEMA, **where, "ratios": rounded}, indent=1) + "\n")
