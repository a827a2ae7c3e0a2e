"""Calls that are not made: faults that are known and not yet mended (none now; each has a test that must fail in
tests/fuzz/test_fuzz_regressions.py), and what is by design not as in eager PyTorch."""

from __future__ import annotations

from typing import Any


def fault(unit: dict[str, Any]) -> str | None:
    """Why a unit of one call is not run, or None."""
    problem = unit.get("problem", {})
    if problem.get("kind") == "not finite" and not problem.get("normalize", True):
        return "by design: an infinite similarity makes its row NaN"
    return None
