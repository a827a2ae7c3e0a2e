"""What a run does one after the other: a unit is a problem with its calls, some calls that must be refused, or some
damaged files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz import calls, invalid, known, readers

REFUSED, READ = 10, 3  # in a unit


def describe(c: Any) -> dict[str, Any]:
    kind = c.whole(1, 20)
    if kind <= 12:
        return calls.case(c)
    if kind <= 19:
        return {"invalid": [invalid.describe(c) for _ in range(REFUSED)]}
    return {"readers": [readers.describe(c) for _ in range(READ)]}


def run(
    unit: dict[str, Any], begins: Callable[[int], None] = lambda k: None
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Run a unit; how many calls of each kind it made, and its faults. ``begins`` is told the number of each call
    before it."""
    found: list[dict[str, Any]] = []
    made = {"compared": 0, "refused": 0, "read": 0, "known": 0}

    def one(k: int, kind: str, what: dict[str, Any], call: Callable[[], None]) -> None:
        if known.fault(what):
            made["known"] += 1
            return
        begins(k)
        made[kind] += 1
        try:
            call()
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {error}", "unit": what})

    if "invalid" in unit:
        for k, d in enumerate(unit["invalid"]):
            one(k, "refused", {"invalid": [d]}, lambda d=d: invalid.run(d))
    elif "readers" in unit:
        with tempfile.TemporaryDirectory() as folder:
            for k, d in enumerate(unit["readers"]):
                one(k, "read", {"readers": [d]}, lambda d=d: readers.run(d, Path(folder)))
    else:
        problem = calls.make(unit["problem"])
        for k, call in enumerate(unit["calls"]):
            what = {"problem": unit["problem"], "calls": [call]}
            one(k, "compared", what, lambda call=call: calls.run(problem, call))
    return made, found
