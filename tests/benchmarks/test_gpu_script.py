"""A session on a GPU (benchmarks/gpu.sh, benchmarks/gpu.py), rehearsed on a machine that needs none: the first minute
on one is not for typos. What can only run there is run here with a stand-in for the device or the package."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not beside this package", allow_module_level=True)
sys.path.insert(0, str(ROOT))

import pycse  # noqa: E402
from benchmarks import gpu, gpu_tune, internals, limits, measure, peers  # noqa: E402
from benchmarks.formulas import TAU, reference  # noqa: E402
from benchmarks.measure import Events, Graphs, interleaved  # noqa: E402
from benchmarks.peers import PEERS, PYCSE, ParityError, beside, parity  # noqa: E402
from benchmarks.workloads import ON_A_GPU, Workload, inputs  # noqa: E402

pytestmark = pytest.mark.clean_memory
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def script(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "TRITON_INTERPRET": "0", **env},
        capture_output=True,
        text=True,
    )


class TestScript:
    def test_dry_run(self, tmp_path):
        done = script("--dry-run", OUT=str(tmp_path))
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        (file,) = tmp_path.glob("gpu-dry-run-*.json")
        results = json.loads(file.read_text())
        assert {"schema", "date", "machine", "commit", "missing"} < set(results)
        for section, w in ON_A_GPU:
            row = results[section][w.name]
            assert row["parity"]["pycse"] < 0.1 and {"best", "seconds", "ratios", "share", "spread"} < set(row)
        text = file.with_suffix(".md").read_text()
        assert "Dry run" in text and "failed: " not in text.replace("eager failed: ", "")
        measured = [line.split("|")[4].strip() for line in text.splitlines() if line.startswith("| ")][1:]
        # the peers that need a GPU, and torch.compile
        assert measured.count("not measured") == 4

    def test_an_unknown_argument_is_refused(self, tmp_path):
        done = script("--fast", OUT=str(tmp_path))
        assert done.returncode == 2 and "--check-only" in done.stderr

    @without_gpu
    def test_without_a_gpu_it_says_so(self, tmp_path):
        done = script(OUT=str(tmp_path))
        assert done.returncode == 1 and "No GPU is available" in done.stderr
        assert not list(tmp_path.iterdir())


class TestSession:
    @pytest.fixture
    def session(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        return gpu.Session(dry=True)

    @pytest.fixture
    def only(self, monkeypatch, session):
        """Runs with these tasks in place of the real ones: failures and the results."""

        def run(folder, tasks, only=(), seconds=60.0, fresh=False):
            monkeypatch.setattr(session, "tasks", lambda: tasks)
            left = gpu.run(session, folder, list(only), seconds, fresh)
            return left, json.loads(next(folder.glob("*.json")).read_text())

        return run

    def test_a_task_that_fails_stops_no_other(self, tmp_path, only):
        def fails():
            raise AssertionError("off")

        left, results = only(tmp_path, {"rows first": fails, "ceilings": lambda: {"copy TB/s": 1.0}})
        assert left == 1 and results["rows"]["first"]["error"] == "AssertionError: off"
        assert results["ceilings"]["copy TB/s"] == 1.0
        assert "rows first failed: AssertionError: off" in next(tmp_path.glob("*.md")).read_text()

    def test_a_run_goes_on_where_one_was_cut_off(self, tmp_path, only):
        calls = []
        tasks = {name: lambda name=name: calls.append(name) or {} for name in ("rows a", "rows b", "tune")}
        assert only(tmp_path, tasks, seconds=-1)[0] == 3 and not calls
        assert only(tmp_path, tasks, only=["a"])[0] == 2 and calls == ["rows a"]
        assert "rows b: not yet measured" in next(tmp_path.glob("*.md")).read_text()
        left, results = only(tmp_path, tasks)
        assert left == 0 and calls == ["rows a", "rows b", "tune"] and set(results["rows"]) == {"a", "b"}
        only(tmp_path, tasks)
        assert len(calls) == 3
        only(tmp_path, tasks, only=["tune"])
        assert calls[3:] == ["tune"]
        only(tmp_path, tasks, fresh=True)
        assert calls[4:] == ["rows a", "rows b", "tune"]

    def test_another_commits_rows_are_not_taken(self, tmp_path, only, monkeypatch):
        only(tmp_path, {"rows a": dict})
        monkeypatch.setattr(measure, "commit", lambda: "another")
        left, results = only(tmp_path, {"rows a": dict}, seconds=-1)
        assert left == 1 and "rows" not in results

    def test_a_lost_context_ends_the_session(self, tmp_path, only, monkeypatch):
        def lost():
            raise RuntimeError("unspecified launch failure")

        monkeypatch.setattr(measure, "tidy", lost)
        left, results = only(tmp_path, {"rows a": dict, "rows b": dict})
        assert left == 2 and "launch failure" in results["rows"]["a"]["error"] and "b" not in results["rows"]

    @pytest.mark.parametrize("wrong", ["pycse", "pycse-torch", "eager"])
    def test_what_disagrees_is_not_timed(self, session, monkeypatch, wrong):
        """The default backend's row then fails; another backend's says so; a peer is left out."""
        honest = gpu.record.parity

        def parity(w, x, peer, alternative, expected):
            if peer.name == wrong:
                raise ParityError(f"{wrong} is off")
            return honest(w, x, peer, alternative, expected)

        monkeypatch.setattr(gpu.record, "parity", parity)
        monkeypatch.setattr(session, "others", ["torch"])
        w = Workload("focal", 64, 16, "bf16")
        if wrong == "pycse":
            with pytest.raises(ParityError):
                session.row("rows", w)
            return
        row = session.row("rows", w)
        assert wrong in row["left out"] and wrong not in row["best"] and ("error" in row) == (wrong != "eager")

    def test_arguments(self, monkeypatch, capsys):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--only", "nosuch"])
        with pytest.raises(SystemExit):
            gpu.main()
        assert "--only nosuch" in capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["gpu"])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert gpu.main() == 1 and "No GPU is available" in capsys.readouterr().out

    def test_names_are_unique(self):
        names = [(section, w.name) for section, w in ON_A_GPU]
        assert len(set(names)) == len(names) and {section for section, _ in names} == set(gpu.CLOCKS)
        assert {*gpu.PROFILED, gpu.LAYER} < set(gpu.BY_NAME)


class TestClocks:
    """With a device whose time is that of the calls made."""

    @pytest.fixture
    def now(self, monkeypatch):
        now, captured = [0.0], []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = now[0]

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self):
                now[0] += self.seconds

        @contextlib.contextmanager
        def capture(graph):
            begin = now[0]
            yield
            graph.seconds, now[0] = now[0] - begin, begin
            captured.append(graph)

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        for name, stand_in in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda s: contextlib.nullcontext(),
            "synchronize": lambda: None,
            "_sleep": lambda cycles: now.__setitem__(0, now[0] + 1.0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(measure, "CACHE", 16)
        monkeypatch.setattr(measure, "device", lambda: "cpu")
        return now

    def call(self, now, seconds):
        calls = []
        return calls, lambda: calls.append(now.__setitem__(0, now[0] + seconds))

    def test_events(self, now):
        calls, call = self.call(now, 0.002)
        assert Events().seconds(call, 5) == pytest.approx(0.002) and len(calls) == 5

    def test_a_cold_cache(self, now):
        calls, call = self.call(now, 0.001)
        clock = Events(cold=True)
        clock.cache.fill_(7)
        assert clock.seconds(call, 3) == pytest.approx(0.001) and len(calls) == 3
        assert not clock.cache.any() and now[0] > 3  # kept busy before every call, which is not counted
        assert clock.seconds(call, 1000) == pytest.approx(0.001) and len(calls) == 3 + measure.COLD

    def test_graphs(self, now):
        calls, call = self.call(now, 1e-4)
        clock = Graphs()
        replay = clock.ready(call)
        assert len(calls) == 2 + measure.REPEAT
        begin = now[0]
        assert clock.seconds(replay, 30) == pytest.approx(1e-4) and now[0] - begin == pytest.approx(30e-4)
        assert clock.seconds(replay) == pytest.approx(1e-4)

    @pytest.mark.parametrize("clock", [Events, Graphs, lambda: Events(cold=True)], ids=["events", "graphs", "cold"])
    def test_turns(self, now, clock):
        timings = interleaved({"fast": self.call(now, 1e-4)[1], "slow": self.call(now, 3e-4)[1]}, 0.2, clock())
        assert timings["fast"].median == pytest.approx(1e-4) and timings["slow"].best == pytest.approx(3e-4)
        assert len(timings["fast"].seconds) == len(timings["slow"].seconds) >= 3


def test_the_machine_and_its_memory(monkeypatch):
    """What a GPU is asked for; on one, the same calls answer."""
    freed = []
    for name, value in {
        "is_available": True,
        "get_device_name": "NVIDIA H200",
        "get_device_capability": (9, 0),
        "mem_get_info": (5, 9),
        "memory_allocated": 100,
        "max_memory_allocated": 150,
        "reset_peak_memory_stats": None,
        "synchronize": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    assert measure.machine().startswith("NVIDIA H200 (sm_90, CUDA") and measure.device() == "cuda"
    assert measure.available_memory() == 5 and measure.peak_memory(lambda: None) == 50
    measure.tidy()
    assert freed and not replace(ON_A_GPU[0][1], op="symmetric").huge


def test_without_git_a_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert measure.commit() == "unknown"


class TestWays:
    """Measured and checked with the sanitizer: a default would hide the kernels that are off or for other sizes."""

    def test_every_way_of_the_cuda_backend_is_taken(self):
        from pycse.backends.cuda import contrastive as cuda

        z = torch.randn(2, 68, 40)
        (problem,) = [internals.problem_of("contrastive", lambda: pycse.fused_focal_infonce(*z, backend="cpu"))]
        seen = []
        for setting in internals.routes("cuda").values():
            with setting():
                seen.append((cuda.FUSED, cuda.fits(problem)))
        assert seen == [(0, True), (0, False), (1, False), (2, False)] and cuda.FUSED == 0

    def test_panels_of_some_rows(self):
        from pycse.panels import contrastive

        with internals.panels(48):
            assert contrastive.panel_rows(100, 1, None, 0) == 48 and contrastive.panel_rows(20, 1, None, 0) == 20

    def test_the_largest_tile_is_taken(self):
        triton = pytest.importorskip("pycse.backends.triton.contrastive")
        tiles = []
        for setting in internals.largest_tiles().values():
            with setting():
                tiles.append(triton.tile("bf16", 90, 132, 64, 64, aligned=True))
        assert [t.copied for t in tiles] == [False, True] and tiles[0].m == 128

    def test_the_best_of_a_table(self):
        table = {"rows": {"a": {"1": 2.0, "2": 1.0}, "b": {"1": "OutOfResources"}}, "tiles": {"x": 3.0, "y": "no"}}
        assert gpu_tune.best(table) == {"rows": {"a": "2"}, "tiles": "x"}


# --- peers and limits of a GPU


def module(name: str, **members: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(members)
    return made


def cross_entropy(q, k, scale, target=None, reduction="none"):
    target = torch.arange(len(q)) if target is None else target
    return F.cross_entropy((q.float() @ k.float().t()) * scale, target, reduction=reduction)


def memeff_loss(symmetric, **expected):
    def loss(temperature, **options):
        assert options == expected

        def forward(a, b):
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
            one = cross_entropy(a, b, 1 / temperature, reduction="mean")
            return (one + cross_entropy(b, a, 1 / temperature, reduction="mean")) / 2 if symmetric else one

        return forward

    return loss


def siglip(a, b, log_scale, bias):
    l = log_scale.exp() * (a @ b.t()).float() + bias
    return -F.logsigmoid(torch.where(torch.eye(len(a)) > 0, l, -l)).sum() / len(a)


def cce(e, c, target, filter_eps):
    assert filter_eps in (None, "high")
    return cross_entropy(e, c, 1, target, "mean")


LIGER = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
liger = types.SimpleNamespace(apply=lambda a, b, target, tau: cross_entropy(a, b, 1 / tau, target))
one_way = {"margin": 2.0, "stable": False, "use_qq_negatives": False, "use_dd_negatives": False}
stk = module("stk", ops=types.SimpleNamespace(to_sparse=lambda w, side: w, dds=lambda x, w: x @ w))
MODULES = {
    "memeff": module(
        "memeff",
        MemoryEfficientCLIPLoss=memeff_loss(True, stable=False),
        MemoryEfficientQwen3Loss=memeff_loss(False, **one_way),
    ),
    "siglip_kernel": module("siglip_kernel", fused_siglip_loss=siglip),
    "inf_cl": module("inf_cl", cal_flash_loss=lambda q, k, target, scale: cross_entropy(q, k, scale, target)),
    "cut_cross_entropy": module("cut_cross_entropy", linear_cross_entropy=cce),
    "liger_kernel": module("liger_kernel"),
    "liger_kernel.ops": module("liger_kernel.ops"),
    LIGER: module(LIGER, LigerFusedLinearScaledCrossEntropyFunction=liger),
    "stk": stk,
}
SHAPES = [
    Workload("focal", 300, 256, "bf16"),
    Workload("infonce", 300, 256, "bf16"),
    Workload("symmetric", 300, 256, "bf16"),
    Workload("sparse", 64, 128, "bf16", False, pattern="block64", zeros=50, out=256),
    Workload("sparse", 64, 128, "bf16", False, pattern="2:4", zeros=50, out=256),
]


@pytest.fixture
def with_gpu(monkeypatch):
    """What asks for a GPU finds one; memory is plenty."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peers, "available_memory", lambda: 1 << 40)


@pytest.fixture
def packages(monkeypatch):
    """The packages need a GPU: in their place, their losses in plain PyTorch under their names and arguments."""
    for name, stand_in in MODULES.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: w)


@pytest.mark.parametrize("name", [peer.name for peer in PEERS if peer.gpu])
def test_peers_are_called_as_their_interfaces_ask(name, packages, with_gpu):
    peer = next(peer for peer in PEERS if peer.name == name)
    covered = [w for w in SHAPES if peer.covers(w)]
    assert covered
    for w in covered:
        x = inputs(w)
        alternative = peer.build(w, x)
        off = parity(w, x, peer, alternative, reference(w, x))
        assert off < 0.1 or peer.differs
        alternative.step(w.backward)()


def test_a_peer_that_computes_something_else_is_not_timed(packages, monkeypatch):
    twice = lambda q, k, target, scale: 2 * cross_entropy(q, k, scale, target)  # noqa: E731
    monkeypatch.setattr(MODULES["inf_cl"], "cal_flash_loss", twice)
    w, peer = SHAPES[1], next(peer for peer in PEERS if peer.name == "inf-cl")
    x = inputs(w)
    with pytest.raises(ParityError, match="inf-cl is off by"):
        parity(w, x, peer, peer.build(w, x), reference(w, x))


def test_what_stands_beside_the_largest_workloads(with_gpu):
    largest = {w.op: beside(w, [], False) for section, w in ON_A_GPU[:3]}
    floors = [p.name for p in largest["focal"][0] if p.limit]
    assert floors == [f"floor-{c}{wide}" for wide in ("", "-wide") for c in peers.PANELS if c > 512]
    assert "siglip-kernel" in largest["focal"][1] and "memeff" in largest["symmetric"][1]
    assert {"inf-cl", "cce", "cce-exact", "liger"} < set(largest["infonce"][1])
    assert beside(replace(ON_A_GPU[0][1], N=1024), [], False)[0][-1].name == "floor-1024-wide"


def test_a_floor_whose_product_adds_to_the_sum(monkeypatch):
    """torch.addmm of 16-bit matrices into float32 is CUDA's; elsewhere the floor says at once that it cannot."""
    w = Workload("symmetric", 48, 16, "bf16")
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, TypeError)):
            limits.products(w, inputs(w), 32, wide=True)
    sums = []

    def addmm(total, a, b, out_dtype, out):
        assert total is out and total.dtype == out_dtype == torch.float32 and a.dtype == torch.bfloat16
        sums.append(out.add_(a.float() @ b.float()))

    monkeypatch.setattr(torch, "addmm", addmm)
    floor = limits.products(w, inputs(w), 32, wide=True)
    assert len(sums) == 1 and floor() is None and len(sums) == 3 and sums[-1].shape == (48, 16)


@pytest.mark.parametrize("shuffle", ["none", "expected"])
def test_teachers_in_16_bits(shuffle):
    """As they come on a GPU; the formula widens them."""
    w = Workload("distillcse", 96, 64, "bf16", teachers=2, shuffle=shuffle)
    x = inputs(w)
    x.teachers = [teacher.bfloat16() for teacher in x.teachers]
    assert parity(w, x, PYCSE, PYCSE.build(w, x), reference(w, x)) < 0.1
    assert inputs(w).teachers[0].dtype == torch.float32 and TAU == 0.05
