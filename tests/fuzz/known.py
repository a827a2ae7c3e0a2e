"""Faults that are known and not yet mended: calls that meet one are not made. tests/test_fuzz_regressions.py has each
as a test that must fail; when it passes, it and its line here go."""

from __future__ import annotations

from typing import Any


def fault(unit: dict[str, Any]) -> str | None:
    """Which known fault a unit of one call meets."""
    if "problem" in unit:
        return _of_call(unit["problem"], unit["calls"][0])
    if "invalid" in unit:
        return _of_refusal(unit["invalid"][0])
    return _of_reader(unit["readers"][0])


def _of_call(problem: dict[str, Any], call: dict[str, Any]) -> str | None:
    chosen, states = call["layouts"], call.get("states", ())
    if problem["op"] == "masked_linear" and "autocast" in states and problem["dtype"] == "float16":
        return "backward of masked_linear under autocast to float16"
    if problem["op"] in ("masked_linear", "SparseLinear") and "inference mode" in states and "enable grad" in states:
        return "what is made of an argument in inference mode cannot be saved"
    if (
        problem["op"] == "masked_linear"
        and problem["packed"]
        and problem["in_"] <= 32
        and chosen.get("mask") == "every other"
    ):
        return "packed masks of one word a row that are strided"
    if problem["kind"] == "not finite" and not problem.get("normalize", True):
        return "by design: an infinite similarity makes its row NaN"
    if problem.get("weight") == "float16" and not problem["normalize"]:
        return "the gradient of float16 weights is rounded before it is multiplied by the upstream gradient"
    return None


def _of_refusal(d: dict[str, Any]) -> str | None:
    return None


def _of_reader(d: dict[str, Any]) -> str | None:
    if d["reader"] == "mask_file":
        return "damaged safetensors are not named"
    return None
