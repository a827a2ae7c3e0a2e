"""The benchmarks: names, parity of everything timed, the check against the baseline, documents made of results, bad
input.

No time is asserted: what is compared are numbers made up here, counts of operations, and one slow-down planted on
purpose.
"""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not beside this package", allow_module_level=True)
sys.path.insert(0, str(ROOT))

import pycse  # noqa: E402
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import baseline, docs, growth, measure, peers  # noqa: E402
from benchmarks.compare import Side, compared  # noqa: E402
from benchmarks.formulas import reference  # noqa: E402
from benchmarks.measure import Turns  # noqa: E402
from benchmarks.peers import PEERS, PYCSE, Peer, beside, parity, too_large  # noqa: E402
from benchmarks.workloads import SETS, WORKLOADS, Workload, inputs, select  # noqa: E402
from pycse.training.errors import UserError  # noqa: E402

pytestmark = pytest.mark.clean_memory
ROWS = "contrastive-rows-8192x768-fp32"

SMALL = [
    *(Workload(op, 37, 24, dtype, backward) for op in ("infonce", "focal", "symmetric") for dtype in ("fp32", "bf16")
      for backward in (True, False)),
    Workload("focal", 1500, 16),  # a reference of two chunks
    Workload("symmetric", 1500, 16),  # and of two directions
    *(Workload("distillcse", 37, 24, dtype, teachers=k, shuffle=s)
      for dtype, k in (("fp32", 1), ("fp32", 3), ("bf16", 3)) for s in ("none", "expected", "sample")),
    *(Workload("uniformity", 37, 24, backward=backward) for backward in (True, False)),
    *(Workload("sparse", 33, 64, dtype, backward, pattern=pattern, zeros=50, out=128)
      for pattern in ("block16", "block32", "block64", "unstructured") for dtype in ("fp32", "bf16")
      for backward in (True, False)),
    *(Workload("contrastive-rows", 96, dtype=dtype) for dtype in ("fp32", "bf16")),
    *(Workload("distill-rows", 96, shuffle=s) for s in ("none", "expected", "sample")),
]  # fmt: skip


def main(monkeypatch, capsys, *arguments):
    """Run the command in this process: (exit code, what it printed on stderr)."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        command.main()
    return done.value.code or 0, capsys.readouterr().err


class TestWorkloads:
    def test_names_are_unique(self):
        names = [w.name for w in WORKLOADS]
        assert len(set(names)) == len(names) and not any("," in name for name in names)

    def test_sets_are_nested(self):
        short, default, full = ({w.name for w in select(s)} for s in SETS)
        assert short < default < full == {w.name for w in WORKLOADS}

    def test_a_pattern_finds_what_only_a_larger_set_has(self):
        assert [w.name for w in select("short", "focal-64x1024-fp32")] == ["focal-64x1024-fp32"]
        assert {w.op for w in select("default", "focal-*")} == {"focal"}

    def test_inputs_are_the_same_every_time(self):
        for w in SMALL[:1] + SMALL[-1:]:
            assert all(torch.equal(a, b) for a, b in zip(inputs(w).leaves, inputs(w).leaves))


class TestParity:
    @pytest.mark.parametrize("workload", SMALL, ids=lambda w: w.name)
    def test_of_every_peer(self, workload):
        x = inputs(workload)
        expected = reference(workload, x)
        chosen, _ = beside(workload, [], False)
        assert chosen[0] is PYCSE and len(chosen) > 1
        for peer in chosen:
            alternative = peer.build(workload, x)
            off = parity(workload, x, peer, alternative, expected)
            assert (off is None) == peer.limit
            alternative.step(workload.backward)()

    def test_a_wrong_loss_or_gradient_is_named(self):
        w = SMALL[0]
        x = inputs(w)
        expected = reference(w, x)
        for factor in (1.01, -1.0):
            wrong = PYCSE.build(w, x)
            right = wrong.output
            wrong.output = lambda right=right, factor=factor: right() * factor
            with pytest.raises(AssertionError, match="infonce-37x24-fp32: pycse is off by"):
                parity(w, x, PYCSE, wrong, expected)

    def test_another_loss_is_measured_not_asserted(self):
        w = replace(SMALL[0], op="distillcse", teachers=1, shuffle="none")
        x = inputs(w)
        other = Peer("other", lambda w: True, PYCSE.build, "torch", "elsewhere", "doubled")
        alternative = PYCSE.build(w, x)
        right = alternative.output
        alternative.output = lambda: 2 * right()
        assert parity(w, x, other, alternative, reference(w, x)) == pytest.approx(1, abs=1e-3)


class Operations(TorchDispatchMode):
    """Counts those of matrix products."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.__name__.split(".")[0]) in ("mm", "addmm", "addmm_"):
            left, right = args[-2:] if name == "mm" else args[1:3]
            self.total += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("w", "products"),
    [
        (Workload("focal", 64, 32), 6),
        (Workload("focal", 64, 32, backward=False), 2),
        (Workload("symmetric", 64, 32), 8),
        (Workload("symmetric", 64, 32, backward=False), 2),
        (Workload("distillcse", 64, 32, teachers=1, shuffle="none"), 14),
        (Workload("distillcse", 64, 32, teachers=3, shuffle="none"), 18),
        (Workload("focal", 64, 32, "bf16"), 6),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_a_floor_does_the_workloads_products(w, products):
    floor = next(p for p in PEERS if p.name == "floor-512").build(w, inputs(w)).output
    with Operations() as counted:
        floor()
    assert counted.total == products * w.N**2 * w.D


class TestTurns:
    @pytest.fixture
    def clock(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
        return lambda seconds: lambda: now.__setitem__(0, now[0] + seconds)

    def test_all_take_part_in_every_round_and_short_calls_in_batches(self, clock):
        turns = Turns({"ours": clock(0.001), "theirs": clock(0.02)})
        assert turns.batch == {"ours": pytest.approx(10, abs=1), "theirs": 1}
        rounds = turns.plan(3.0)
        assert rounds == pytest.approx(100, abs=5)
        for _ in range(rounds):
            turns.time_others()
            turns.time_first()
        assert all(len(t.seconds) == rounds for t in turns.timings.values())
        assert turns.timings["theirs"].best == pytest.approx(0.02) and turns.timings["ours"].best == pytest.approx(
            0.001
        )

    def test_a_slow_peer_leaves_rounds_to_the_others(self, clock):
        turns = Turns({"ours": clock(0.01), "theirs": clock(5.0)})
        assert turns.plan(9.0) == 400
        for _ in range(3):
            turns.time_others()
        assert turns.timings["theirs"].seconds == [5.0, 5.0]
        assert Turns({"ours": clock(1.0), "theirs": clock(50.0)}).plan(9.0) == 9


class TestBaseline:
    def test_smaller_ratios_fail_by_more_than_the_tolerance(self):
        known = {"w": {"eager": 2.0, "floor-512": 0.9}}
        worse = lambda **r: [(x.peer, x.measured) for x in baseline.regressions({"w": r}, known, 0.1)]  # noqa: E731
        assert worse(eager=1.81) == [] and worse(eager=5.0) == []
        assert worse(eager=1.79) == [("eager", 1.79)]
        assert worse(**{"eager": 2.0, "floor-512": 0.8}) == [("floor-512", 0.8)]
        assert worse(eager=float("nan")) != []

    def test_a_regression_shows_in_every_attempt(self):
        known, slow, fast = {"w": {"eager": 2.0}}, {"eager": 1.0}, {"eager": 1.9}

        def once(*attempts):
            return baseline.regressions({"w": baseline.combined(list(attempts), max)}, known)

        assert once(slow) and once(slow, slow) and not once(slow, fast)

    def test_a_regression_names_itself_and_both_ratios(self):
        said = str(baseline.Regression("focal-64", "eager", 1.5, 3.0))
        assert all(word in said for word in ("focal-64", "eager", "1.500", "3.000", "50%", f"{baseline.TOLERANCE:.0%}"))

    def test_thirty_percent_slower_is_more_than_the_tolerance(self):
        assert baseline.regressions({"w": {"yardstick": 1 / 1.3}}, {"w": {"yardstick": 1.0}})

    def test_the_baseline_knows_what_the_check_measures(self):
        known = baseline.load(baseline.FILE, [w.name for w in select("short")])
        assert {"date", "machine", "commit"} < set(known)
        assert set(known["ratios"]) == {w.name for w in select("short")}

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "does not exist"),
            ("no json", "is no baseline"),
            ("[]", "is no baseline"),
            ('{"schema": 99, "ratios": {}}', "has schema 99, this version reads"),
            ('{"schema": 1, "ratios": {}}', "does not know focal-64x768-fp32"),
        ],
    )
    def test_a_baseline_that_cannot_be_used(self, tmp_path, monkeypatch, capsys, content, said):
        path = tmp_path / "baseline.json"
        if content is not None:
            path.write_text(content)
        code, error = main(monkeypatch, capsys, "check", "--baseline", path)
        assert code == 2 and said in error and "make bench-update" in error and error.count("\n") == 1

    @pytest.mark.parametrize("same", [True, False])
    def test_only_the_processor_of_the_baseline_fails(self, tmp_path, monkeypatch, capsys, same):
        name, path = "focal-64x768-fp32", tmp_path / "baseline.json"
        baseline.save(
            path,
            {"machine": measure.machine() if same else "Another, 1 threads", "commit": "x"},
            {name: {"eager": 2.0}},
        )
        monkeypatch.setattr(
            command, "checked", lambda chosen: ({w.name: {"ratios": {"eager": 1.0}} for w in chosen}, False)
        )
        with pytest.raises(command.typer.Exit) if same else contextlib.nullcontext():
            command.check(name, path)
        said = capsys.readouterr()
        assert f"slower: {name}: eager/pycse is 1.000" in said.err and ("another processor" in said.out) != same


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("run", "--workload", "nosuch"), "no workload is called 'nosuch'"),
            (("check", "--workload", "nosuch"), "no workload is called 'nosuch'"),
            (("run", "--peer", "nosuch"), "no peer is called 'nosuch'"),
        ],
    )
    def test_unknown_names(self, monkeypatch, capsys, arguments, said):
        code, error = main(monkeypatch, capsys, *arguments)
        assert code == 2 and said in error and error.count("\n") == 1

    def test_what_does_not_fit_into_memory_is_left_out_and_listed(self, monkeypatch):
        large, small = (next(w for w in WORKLOADS if w.name == f"focal-{N}x768-fp32") for N in (65536, 64))
        monkeypatch.setattr(peers, "available_memory", lambda: 1 << 30)
        fits, skipped = command.fitting([large, small])
        assert fits == [small] and "needs about" in skipped[large.name] and "1.1 GB are free" in skipped[large.name]
        chosen, left_out = beside(replace(large, N=8192), [], False)
        assert [p.name for p in chosen if not p.limit] == ["pycse"] and "needs about" in left_out["eager"]

    def test_a_run_that_measures_nothing_says_so(self, monkeypatch, capsys):
        monkeypatch.setattr(peers, "available_memory", lambda: 1 << 20)
        monkeypatch.setattr(measure, "import_seconds", lambda: 0.0)
        monkeypatch.setattr(sys, "argv", ["benchmarks", "run", "--workload", "focal-64x768-fp32"])
        with pytest.raises(SystemExit) as done:
            command.main()
        assert not done.value.code
        assert "left out: focal-64x768-fp32: needs about" in capsys.readouterr().out

    def test_a_missing_package_is_named(self):
        assert (
            "pip install nothing==1" in Peer("x", PYCSE.covers, PYCSE.build, "no_such_module", "nothing==1").missing()
        )
        for peer in PEERS:
            if peer.gpu and not torch.cuda.is_available():
                assert peer.missing() == "needs an NVIDIA GPU"

    def test_sizes_that_fit(self):
        assert too_large(SMALL[0]) == ""


class TestGrowth:
    def test_exponents(self):
        assert growth.exponent({N: 3e-9 * N**2 for N in (256, 512, 4096)}) == pytest.approx(2)
        assert growth.exponent({256: 5.0, 512: 5.0}) == pytest.approx(0)
        assert growth.exponent({256: 1.0}) is None and growth.exponent({}) is None

    def test_where_the_floor_is_near(self):
        assert growth.near_floor({64: 0.4, 512: 0.95, 1024: 0.85, 2048: 0.93, 4096: 0.97, 8192: 0.8}) == (2048, 4096)
        assert growth.near_floor({64: 0.4, 128: 0.9}) == (128, 128)
        assert growth.near_floor({64: 0.4}) is None


class TestDocuments:
    def test_they_are_made_from_the_newest_results(self):
        results = docs.load(docs.newest(command.RESULTS))
        for name in docs.DOCUMENTS:
            text = (ROOT / name).read_text()
            assert docs.render(text, results) == text, f"{name} is out of date: python -m benchmarks docs"

    def test_every_part_stands_somewhere_and_survives_missing_numbers(self):
        texts = "".join((ROOT / name).read_text() for name in docs.DOCUMENTS)
        nothing = {"rows": {}, "raised": {}, "missing": {}, "skipped": {}, "import seconds": 0.0, "stem": "cpu"}
        nothing |= {"date": "", "machine": "", "commit": ""}
        for name, part in docs.PARTS.items():
            assert f"<!-- bench {name} -->" in texts
            assert part(nothing)

    def test_an_unknown_part(self):
        with pytest.raises(UserError, match="no part is called 'nosuch'"):
            docs.render("<!-- bench nosuch -->\n<!-- end -->", {})

    @pytest.mark.parametrize("content", ["no json", "[]", '{"schema": 0}'])
    def test_results_that_cannot_be_read(self, tmp_path, monkeypatch, capsys, content):
        path = tmp_path / "cpu.json"
        path.write_text(content)
        code, error = main(monkeypatch, capsys, "docs", "--json", path)
        assert code == 2 and str(path) in error and error.count("\n") == 1


class TestCompare:
    NAME = "focal-64x768-fp32"

    @pytest.fixture(scope="class")
    def new(self):
        with Side(None) as side:
            yield side

    def test_two_packages_take_turns(self, new):
        with Side(None) as base:
            c = compared(base, new, self.NAME, 0)
        assert not c.left_out and c.parity["base"] == c.parity["new"] < 1e-4
        assert len(c.timings["base"].seconds) == len(c.timings["new"].seconds) == 5
        assert c.ratio == c.timings["base"].best / c.timings["new"].best

    def test_a_package_that_computes_something_else_is_not_timed(self, new, tmp_path):
        real = Path(pycse.__file__)
        other = tmp_path / "pycse"
        other.mkdir()
        wrong = "load()\nright = fused_focal_infonce\ndef fused_focal_infonce(*a, **k): return 1.01 * right(*a, **k)\n"
        text = real.read_text().replace('if "torch" in', f'__path__ = [{str(real.parent)!r}]\nif "torch" in')
        (other / "__init__.py").write_text(f"{text}\n{wrong}")
        with Side(tmp_path) as base:
            assert base.package == str(other) and new.package == str(real.parent)
            c = compared(base, new, self.NAME, 0)
        assert c.left_out.startswith("base: ParityError") and not c.timings

    def test_what_a_package_cannot_run_is_left_out(self, new, tmp_path):
        (tmp_path / "pycse").mkdir()
        real = Path(pycse.__file__)
        (tmp_path / "pycse" / "__init__.py").write_text(
            real.read_text().replace('if "torch" in', f'__path__ = [{str(real.parent)!r}]\nif "torch" in')
            + "\nload()\ndel fused_focal_infonce\n__all__.remove('fused_focal_infonce')\n"
        )
        with Side(tmp_path) as base:
            assert "fused_focal_infonce" in compared(base, new, self.NAME, 0).left_out

    def test_an_unknown_commit(self, monkeypatch, capsys):
        code, said = main(monkeypatch, capsys, "compare", "--base", "no-such-commit", "--workload", self.NAME)
        assert code == 2 and "'no-such-commit'" in said


def test_the_stages_of_a_call_add_up():
    from benchmarks.profile import stages_of

    stages = stages_of(inputs(Workload("focal", 200, 16)), 200, 2, 3)
    assert sum(s for name, s in stages.items() if name != "total") == pytest.approx(stages["total"])
    assert {"validation", "rest", "total"} < set(stages)


def test_a_slower_row_kernel_is_caught(tmp_path, monkeypatch, capfd):
    """The real commands: a baseline, a check that passes, and one that fails on a kernel that does 30% more work.

    What else runs on a machine moves a ratio by up to 20%, either way, so the three are tried again where one went
    astray.
    """
    file = tmp_path / "baseline.json"
    monkeypatch.setattr(command, "SECONDS", 1.0)

    def check_fails(attempts: int) -> bool:
        monkeypatch.setattr(command, "ATTEMPTS", attempts)
        try:
            command.check(ROWS, file)
        except command.typer.Exit as done:
            return done.exit_code == 1
        return False

    def caught() -> bool:
        monkeypatch.setattr(command, "ATTEMPTS", 1)
        command.update(ROWS, file)
        if check_fails(attempts=3):
            return False
        with monkeypatch.context() as slow:
            slow.setenv("PYTEST_ADDOPTS", "-p slow_rows")
            slow.setenv("PYTHONPATH", f"{ROOT / 'tests/helpers'}:{ROOT}")
            capfd.readouterr()
            return check_fails(attempts=1)

    assert any(caught() for _ in range(8))
    known = json.loads(file.read_text())["ratios"][ROWS]["yardstick"]
    assert f"slower: {ROWS}: yardstick/pycse is" in (said := capfd.readouterr().err) and f"baseline {known:.3f}" in said


def test_one_workload_from_the_command_to_its_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(measure, "import_seconds", lambda: 0.0)
    file = tmp_path / "one.json"
    command.run(workload="focal-64x768-bf16", peer=["eager"], json_file=file)
    said = capfd.readouterr().out
    assert said.index("parity pycse") < said.index("eager ") and "pycse beside its peers" in said
    row = json.loads(file.read_text())["rows"]["focal-64x768-bf16"]
    assert set(row["ratios"]) == {"eager", "floor-512"} and row["rounds"] >= 3
    assert row["share"] == row["ratios"]["floor-512"] and set(row["parity"]) == {"pycse", "eager"}
