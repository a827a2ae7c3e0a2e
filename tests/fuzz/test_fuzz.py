"""The fuzzer's fixed share of the suite: the same calls every time. `make fuzz MINUTES=5` makes others, see
tests/fuzz."""

from __future__ import annotations

import copy
import json
import re
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import __main__ as long_run
from fuzz import calls, invalid, known, layouts, problems, readers, units
from fuzz.choices import Drawn, Seeded


@pytest.fixture(autouse=True)
def one_thread():
    """Calls that ask for more threads still get them; the others do not wait for threads that a busy machine keeps
    waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Under hypothesis, to have a failure shrunk; the seeded units after it cost a tenth as much a call.
FEW = settings(derandomize=True, deadline=None, database=None, max_examples=60, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw, op):
    return calls.case(Drawn(draw), op)


def make(unit):
    made, found = units.run(unit)
    assert not found, found
    return made


@pytest.mark.clean_memory
@pytest.mark.parametrize("op", problems.OPS)
def test_calls(op):
    @FEW
    @given(cases(op))
    def run(case):
        make(case)

    run()


@pytest.mark.clean_memory
def test_seeded_units():
    """Seed 0, units 0 to 999: about 4000 compared calls, 3500 refused ones and 150 files."""
    made: dict[str, int] = {}
    for index in range(1000):
        for kind, count in make(units.describe(Seeded(0, index))).items():
            made[kind] = made.get(kind, 0) + count
    assert made["compared"] > 2000 and made["refused"] > 2000 and made["read"] > 50


@pytest.mark.parametrize("op", invalid.NOT_RUN)
def test_every_wrong_argument_is_named(op):
    wrong = []
    for argument, values in invalid.NOT_RUN[op].items():
        for k in range(len(values)):
            for backend in ("cpu", "reference"):
                for module in (False, True):
                    d = dict(op=op, argument=argument, value=k, backend=backend, module=module)
                    if known.fault({"invalid": [d]}):
                        continue
                    try:
                        invalid.run(d)
                    except calls.Fault as fault:
                        wrong.append(str(fault))
    assert not wrong, "\n".join(dict.fromkeys(wrong))


@pytest.mark.parametrize("reader", readers.READERS)
def test_damaged_files(reader, tmp_path):
    for seed in range(200):
        d = dict(reader=reader, seed=seed)
        if not known.fault({"readers": [d]}):
            readers.run(d, tmp_path)


# The fuzzer itself: each kind of fault, planted.
PROBLEM = {
    "op": "focal", "dtype": "float32", "seed": 1, "kind": "random", "B": 5, "D": 4, "normalize": True,
    "reduction": "mean",
    "weight": None, "ramp": True, "focal": True, "temperature": [0.05, "number"], "m": [0.3, "number"],
    "symmetric": False, "N": 6,
    "positives": None, "hard": 0.0, "ids": None, "exclude": None,
}  # fmt: skip
CALL = {
    "backend": "torch", "layouts": {"z1": "padded", "z2": "transposed"}, "alias": "no", "frozen": [], "module": False,
    "panels": None, "factor": -2.5, "backward": "twice",
}  # fmt: skip


def planted(monkeypatch, change):
    """The judgement of a call whose result ``change`` has had in its hands."""
    real = problems.FUNCTIONS["focal"]

    def function(z1, z2, **options):
        if options["backend"] == "reference":
            return real(z1, z2, **options)
        return change(lambda: real(z1, z2, **options), z1, z2)

    monkeypatch.setitem(problems.FUNCTIONS, "focal", function)
    calls.run(calls.make(copy.deepcopy(PROBLEM)), CALL)


def written(loss, z1, z2):
    z1.detach().numpy()[0, 0] += 1  # which no version counts
    return loss()


PLANTED = {
    "value: error": lambda loss, z1, z2: loss() * 1.0001,
    "z1: error": lambda loss, z1, z2: loss() + 1e-3 * (z1 - z1.detach()).sum(),
    "not finite": lambda loss, z1, z2: loss() * torch.nan,
    "z1 was written to": written,
    "does not require grad": lambda loss, z1, z2: loss().detach(),
    "result is torch.float64": lambda loss, z1, z2: loss().double(),
    "result is torch.float32 (1,)": lambda loss, z1, z2: loss()[None],
}


@pytest.mark.parametrize("message", PLANTED)
def test_a_planted_fault_is_found(message, monkeypatch):
    with pytest.raises(calls.Fault, match=re.escape(message)):
        planted(monkeypatch, PLANTED[message])


def test_nothing_planted_nothing_found(monkeypatch):
    planted(monkeypatch, lambda loss, z1, z2: loss())


@pytest.mark.parametrize("kind", layouts.MATRICES)
def test_layouts_hold_the_values(kind):
    values = torch.arange(12.0).view(3, 4)
    same = torch.ones(3, 4)
    sliding = torch.arange(3.0)[:, None] + torch.arange(4.0)
    for given_values in (values, same, sliding, torch.zeros(3, 4)):
        laid, _ = layouts.lay(given_values, kind, lambda t: t)
        assert torch.equal(laid.as_subclass(torch.Tensor).resolve_neg() + 0, given_values)


# A child whose third unit ends it.
BROKEN = """
import os, sys, time
sys.path[:0] = {path!r}
from fuzz import __main__, units
real, count = units.run, []
def run(unit, begins):
    count.append(1)
    if len(count) == 3:
        begins(4)
        {what}
    return real(unit, begins)
units.run = run
sys.exit(__main__.main())
"""


@pytest.mark.parametrize("kind, what", [("crash", "os.abort()"), ("hang", "time.sleep(600)")])
def test_what_ends_a_long_run_is_kept_and_the_run_goes_on(kind, what, tmp_path, monkeypatch):
    monkeypatch.setattr(long_run, "CHILD", [sys.executable, "-c", BROKEN.format(path=sys.path, what=what)])
    worker = long_run.Worker(7, tmp_path)
    first = worker.process
    try:
        end = time.monotonic() + 120
        while not worker.crashes + worker.hangs and time.monotonic() < end:
            worker.watch(hang=3)
            time.sleep(0.1)
        assert (worker.crashes, worker.hangs) == ((1, 0) if kind == "crash" else (0, 1))
        assert worker.process is not first
    finally:
        worker.stop()
    (kept,) = tmp_path.glob(f"{kind}-*.json")
    case = json.loads(kept.read_text())
    assert (case["seed"], case["index"], case["call"]) == (7, 2, 4)
    assert case["unit"] == json.loads(json.dumps(units.describe(Seeded(7, 2))))
