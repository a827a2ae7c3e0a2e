# ruff: noqa: F811 (fixtures are arguments)
"""One run on two processes: one report, one model, the same weights on both, one line for what goes wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import pycse
from tiny_models import needs_extras, tiny_model  # noqa: F401 (a fixture)

import pycse as package
from pycse.training import ranks
from pycse.training.errors import UserError
from pycse.training.settings import Settings

torch = pytest.importorskip("torch")
gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo, by which processes on a CPU speak",
)
SECONDS = 120  # until a test that hangs is ended
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
SENTENCES = [f"the {a} {b} is in the {c}" for a in ("red", "old", "big") for b in ("cat", "dog", "ox") for c in "xy"]


def environment(**more: str) -> dict[str, str]:
    """For a process that shall import the same pycse as this one, talk to this machine alone and not share threads."""
    known = {name: value for name, value in os.environ.items() if name not in sum(ranks.NAMES, ())}
    return known | {
        "PYTHONPATH": str(Path(package.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        **more,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, an evaluation file, and a folder that has content."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text("\n".join(SENTENCES) + "\n")
    pairs = "".join(f"{i % 6}\t{SENTENCES[i]}\t{SENTENCES[-1 - i // 2]} now, and for long\n" for i in range(12))
    (folder / "set-0.tsv").write_text(pairs)
    (folder / "full").mkdir()
    (folder / "full" / "keep.txt").write_text("keep")
    return folder


def short(model, *more) -> list[str]:
    """Arguments of a small run: 18 sentences, 4 a process and step. Texts are cut below what evaluation reads."""
    return [
        "train", "--model", model, "--train-file", "text.txt", "--device", "cpu", "--batch-size", "4", "--steps", "2",
        "--eval-steps", "1", "--max-length", "8", "--lr", "0.01", "--recipe", "focal", *more,
    ]  # fmt: skip


TAUGHT = ("--recipe", "distillcse", "--layers", "0,2", "--eval-file", "set-0.tsv")


@pytest.fixture(scope="module")
def done(place, tiny_model):
    """What two processes did: command -> a result a rank."""
    sparse = ("--recipe", "sparsecse", "--sparsity", "0.4", "--score-batches", "2", "--steps", "2")
    commands = {
        "taught": short(tiny_model, *TAUGHT, "--cache-teachers", "cache"),
        "sparse": short(tiny_model, *sparse, "--finetune-steps", "2", "--out", "sparse"),
        "sparsify": ["sparsify", tiny_model, "--train-file", "text.txt", "--device", "cpu", "--batch-size", "4",
                     "--granularity", "head", "--sparsity", "0.5", "--finetune-steps", "1", "--recipe", "simcse",
                     "--score-batches", "1", "--max-length", "16", "--out", "heads"],
        "eval": ["eval", tiny_model, "--device", "cpu"],
        "alike": short(tiny_model, "--lr", "-1"),
        "full": short(tiny_model, "--out", "full"),
        "few": short(tiny_model, "--batch-size", "10", "--out", "few"),
        "alone": short(tiny_model, "--eval-file", "set-{rank}.tsv", "--out", "alone"),
        "broken": short(tiny_model, "--out", "broken"),
    }  # fmt: skip
    (place / "commands.json").write_text(json.dumps(commands))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    worker = Path(__file__).parents[1] / "helpers" / "one_of_several.py"
    started = [
        subprocess.Popen(
            [sys.executable, str(worker), "commands.json", f"results-{r}.json"],
            cwd=place, env=environment(RANK=str(r), LOCAL_RANK=str(r), **meeting), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    files = [place / f"results-{r}.json" for r in range(2)]
    assert all(file.exists() for file in files), printed
    first, second = (json.loads(file.read_text()) for file in files)
    assert first.keys() == second.keys() == commands.keys(), printed
    return {name: (first[name], second[name]) for name in commands}


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@needs_extras
@gloo
def test_one_report_and_one_model(done, place):
    for name in ("taught", "sparse", "sparsify", "eval"):
        first, second = done[name]
        assert (first["code"], second["code"]) == (0, 0), (first["err"], second["err"])
        assert (second["out"], second["err"]) == ("", "")
    first = done["taught"][0]
    for words in ("2 of 4 a process, 8 in all", "cpu, 2 processes", "kept: sentences"):
        assert first["out"].count(words) == 1
    assert first["out"].count("The run made") == done["sparsify"][0]["out"].count("The run made") == 1
    (out,) = (place / "runs").iterdir()  # of both ranks, though its name has the time
    assert {path.name for path in out.iterdir()} == {"model", "metrics.json", "curves.png", "run.toml", "run.json"}
    metrics = metrics_of(out)
    assert metrics["processes"] == 2 and metrics["steps"] == 2
    assert [entry["step"] for entry in metrics["history"]["scores"]] == [0, 1, 2]


@needs_extras
@gloo
def test_the_weights_are_the_same_on_both(done, place, tiny_model):
    from sentence_transformers import SentenceTransformer

    for name in ("taught", "sparse"):
        first, second = done[name]
        assert first["weights"] == second["weights"] and first["losses"] != second["losses"]
        assert first["random"] != second["random"]  # dropout masks are each rank's own
    (out,) = (place / "runs").iterdir()
    trained, before = (SentenceTransformer(str(model), device="cpu") for model in (out / "model", tiny_model))
    assert not (trained.encode(SENTENCES) == before.encode(SENTENCES)).all()


@needs_extras
@gloo
def test_masks_are_the_same_on_both(done, place):
    first, second = done["sparse"]
    assert first["masks"] == second["masks"] and first["masked"] == second["masked"] > 0
    metrics = metrics_of(place / "sparse")
    report = metrics["pruning"]["report"]
    assert report["removed"] == pytest.approx(0.4 * (report["kept"] + report["removed"]), abs=1)
    assert [entry["step"] for entry in metrics["history"]["loss"]] == [1, 2, 3, 4]
    assert metrics["pruning"]["tuned"] != metrics["pruning"]["sparse"]


@needs_extras
@gloo
def test_what_is_logged_is_the_mean(done, place):
    (out,) = (place / "runs").iterdir()
    for name, folder in (("taught", out), ("sparse", place / "sparse")):
        logged = [entry["loss"] for entry in metrics_of(folder)["history"]["loss"]]
        own = zip(*(result["losses"] for result in done[name]))
        assert logged == pytest.approx([sum(values) / 2 for values in own], rel=1e-5)
    for entry in metrics_of(out)["history"]["loss"]:
        assert entry["contrastive"] + entry["distillation"] == pytest.approx(entry["loss"], rel=1e-5)


@needs_extras
@gloo
def test_each_sentence_is_read_by_one_rank_and_cached_once(done, place):
    from pycse.embedding_cache import HEADER

    (out,) = (place / "runs").iterdir()
    (teacher,) = metrics_of(out)["teachers"]
    (cached,) = (place / "cache").glob("*.embeddings")
    records = (cached.stat().st_size - HEADER) / (32 + 4 * teacher["width"] + 4 + 4)
    assert records == teacher["embedded"] == 2 * 2 * 4 and teacher["from_cache"] == 0


@needs_extras
@gloo
def test_scores_are_those_of_one_process(done, place, tiny_model, monkeypatch):
    monkeypatch.chdir(place)
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    one = place / "one"
    code, _, stderr = pycse(*short(tiny_model, *TAUGHT, "--steps", "1", "--out", "one"))
    assert code == 0, stderr
    (out,) = (place / "runs").iterdir()
    # Threads are not those of the two, and with them rounding.
    for name, measures in metrics_of(one)["before"].items():
        assert metrics_of(out)["before"][name] == pytest.approx(measures, rel=1e-6)
    assert "processes" not in metrics_of(one)
    code, _, stderr = pycse("eval", out / "model", "--eval-file", "set-0.tsv", "--device", "cpu", "--json", "again")
    assert code == 0, stderr
    for name, measures in json.loads((place / "again").read_text())["scores"].items():
        assert metrics_of(out)["after"][name] == pytest.approx(measures, rel=1e-5)


WRONG = {
    "alike": "pycse train: error: --lr is -1; it must be a finite number above 0\n",
    "full": "pycse train: error: --out full has content, which is not overwritten; give a new or empty folder\n",
    "few": "pycse train: error: text.txt has 18 usable lines, fewer than a batch of 10 on each of 2 processes; "
    "give more text or a smaller --batch-size\n",
    "alone": "pycse train: error: rank 1: no such file: set-1.tsv\n",
}


@needs_extras
@gloo
@pytest.mark.parametrize("name", WRONG)
def test_what_the_user_can_put_right_is_one_line(done, place, name):
    first, second = done[name]
    assert (first["code"], second["code"]) == (2, 2)
    assert first["err"] == WRONG[name]
    assert (first["out"], second["out"], second["err"]) == ("", "", "")
    assert not (place / name).exists() or [path.name for path in (place / name).iterdir()] == ["keep.txt"]


@needs_extras
@gloo
def test_what_breaks_on_one_rank_ends_both_and_is_said_once(done, place):
    first, second = done["broken"]
    assert (first["code"], second["code"]) == (1, 1)
    assert second["err"].startswith("pycse train: rank 1: Traceback") and "broken on purpose" in second["err"]
    assert "Traceback" not in first["err"] and "rank" not in first["err"]
    assert not (place / "broken").exists()  # nothing was saved in it


@needs_extras
@gloo
def test_torchrun_takes_the_command_line_of_one_process(place, tiny_model):
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
         "--nproc-per-node", "2", "-m", "pycse", *short(tiny_model, "--steps", "1", "--out", "by-torchrun")],
        cwd=place, env=environment(), capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("kept: sentences") == finished.stdout.count("The run made") == 1
    assert "Warning" not in finished.stderr and "rank1" not in finished.stderr
    assert {path.name for path in (place / "by-torchrun").iterdir()} == {
        "model",
        "metrics.json",
        "curves.png",
        "run.toml",
        "run.json",
    }


# ---- without processes


@pytest.fixture
def launched(monkeypatch):
    """Put the names that a launcher sets into the environment, and no others."""

    def put(**names):
        for name in sum(ranks.NAMES, ()):
            monkeypatch.delenv(name, raising=False)
        for name, value in names.items():
            monkeypatch.setenv(name, value)

    put()
    return put


@pytest.mark.parametrize(
    "names, place",
    [
        ({}, (1, 0, 0)),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, (1, 0, 0)),
        ({"WORLD_SIZE": "4"}, (1, 0, 0)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, (4, 3, 1)),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            (2, 1, 0),
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1"}, (2, 1, 1)),
    ],
)
def test_the_place_that_a_launcher_says(launched, names, place):
    launched(**names)
    assert ranks.place() == place and ranks.first() == (place[1] == 0)


def test_each_process_has_the_gpu_of_its_number(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert [ranks.device(name) for name in ("auto", "cpu", "cuda", "mps")] == ["auto", "cpu", "cuda", "mps"]
    launched(WORLD_SIZE="4", RANK="3", LOCAL_RANK="1")
    assert [ranks.device(name) for name in ("auto", "cpu", "cuda")] == ["cuda:1", "cpu", "cuda:1"]
    with pytest.raises(UserError, match="--device mps runs one process, not 4"):
        ranks.device("mps")
    launched(WORLD_SIZE="4", RANK="3", LOCAL_RANK="2")
    with pytest.raises(UserError, match="this machine has 2 GPUs, fewer than its processes"):
        ranks.device("auto")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert ranks.device("auto") == "cpu"
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [ranks.device(name) for name in ("auto", "cuda")] == ["cpu", "cuda"]  # loading says what cuda lacks


@pytest.mark.parametrize("arguments, code", [(["train", "--help"], 0), (["train", "--nonsense"], 2), (["info"], 0)])
def test_other_ranks_leave_help_to_the_first(launched, monkeypatch, capsys, arguments, code):
    from pycse.cli import main

    monkeypatch.setattr(sys, "argv", ["pycse", *arguments])
    for rank in ("0", "1"):
        launched(WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank)
        with pytest.raises(SystemExit) as left:
            main()
        shown = capsys.readouterr()
        assert (left.value.code or 0) == code and bool(shown.out + shown.err) == (rank == "0")


def test_the_first_to_fail_says_so_and_gives_the_code(launched, monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "meet", lambda: store)
    said = []
    launched(WORLD_SIZE="3", RANK="2", LOCAL_RANK="2")
    assert ranks.failed(2, said.append) == 2
    launched(WORLD_SIZE="3", RANK="0", LOCAL_RANK="0")
    assert ranks.failed(1, said.append) == 2
    assert said == ["rank 2: "]


def test_an_error_of_one_rank_in_training_is_one_line(launched, monkeypatch, capsys):
    from typer import Exit

    from pycse.cli.shared import reported

    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "meet", lambda: store)
    launched(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    with pytest.raises(Exit) as left, reported("train"):
        print("not heard")
        print("nor this", file=sys.stderr)
        raise UserError("--cache-teachers: cannot write x")
    assert left.value.exit_code == 2
    assert capsys.readouterr() == ("", "pycse train: error: rank 1: --cache-teachers: cannot write x\n")


def test_a_meeting_place_that_is_missing_is_named(launched, monkeypatch):
    launched(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        UserError, match=r"rank 1 of 2 cannot meet the others \(.*MASTER_ADDR.*torchrun --nproc-per-node 2"
    ):
        ranks.exchange(None)


def test_steps_follow_from_the_joined_batch(launched):
    from collections import Counter

    from pycse.training.data import Text
    from pycse.training.train import step_count

    text = Text("t", [("a",)] * 100, Counter())
    launched(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert step_count(Settings(batch_size=10, epochs=3.0), text) == 15
    assert step_count(Settings(batch_size=10, steps=7), text) == 7
    launched()
    assert step_count(Settings(batch_size=10, epochs=3.0), text) == 30
