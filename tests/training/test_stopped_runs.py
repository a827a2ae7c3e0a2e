# ruff: noqa: F811 (the fixture is an argument)
"""Runs that are stopped, go on, fail or meet one another: nothing of the user's is lost, and what goes on ends the same."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import SENTENCES, files, place, pycse  # noqa: F401 (a fixture)
from tiny_models import needs_extras, tiny_model  # noqa: F401 (a fixture)

pytestmark = needs_extras
HELPERS = Path(__file__).resolve().parents[1] / "helpers"


def start(tiny_model, out, *more, command="train"):
    model = (
        [tiny_model]
        if command == "sparsify"
        else ["--model", tiny_model, "--recipe", "focal", "--steps", 4, "--eval-steps", 2]
    )
    return pycse(
        command, *model, "--train-file", "text.txt", "--out", out, "--device", "cpu", "--batch-size", 4,
        "--max-length", 16, "--lr", 0.001, *more,
    )  # fmt: skip


def at_step(monkeypatch, step, act):
    """Do something when a step's loss is known, before the next one."""
    from pycse.training.progress import Lines

    shown = Lines.update

    def update(self, now, loss="", score=""):
        if loss and now == step:
            act()
        shown(self, now, loss, score)

    monkeypatch.setattr(Lines, "update", update)


def results(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = {name: metrics[name] for name in ("history", "before", "after", "verdict", "steps")}
    return kept, {path.name: path.read_bytes() for path in (folder / "model").rglob("*.safetensors")}


# ---- signals


@pytest.mark.parametrize(
    "name, more",
    [
        ("SIGINT", ["--keep", "best"]),
        ("SIGTERM", ["--recipe", "distillcse", "--layers", "0,2"]),
        ("SIGHUP", ["--static", 16, "--dims", "16,8", "--recipe", "simcse", "--positives", "next"]),
    ],
)
def test_a_signal_saves_after_the_step_and_the_run_goes_on(place, tiny_model, monkeypatch, name, more):
    code, _, stderr = start(tiny_model, "whole", *more)
    assert code == 0, stderr
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # what started the tests may ignore it
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), number))
        code, _, stderr = start(tiny_model, "out", *more)
    assert signal.signal(number, before) is signal.SIG_DFL  # as it was
    assert code == 128 + number
    assert f"{name}: stopping when this step is saved; once more ends at once" in stderr
    assert f"pycse train: {name}: stopped after step " in stderr and "pycse train --resume out" in stderr
    assert not (place / "out" / "model").exists() and not list((place / "out").rglob(".new-*"))
    code, stdout, stderr = pycse("train", "--resume", "out")
    assert code == 0, stderr
    assert "going on after step" in stdout
    assert results(place / "out") == results(place / "whole")
    code, stdout, _ = pycse("train", "--resume", "out")
    assert code == 0 and "has ended" in stdout


def test_a_signal_before_the_first_step_leaves_nothing(place, tiny_model, monkeypatch):
    from pycse.training import train

    before = files(place)
    monkeypatch.setattr(train, "check_loss", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, _, stderr = start(tiny_model, "out")
    assert code == 143 and stderr == "pycse train: SIGTERM: stopped\n"
    assert files(place) == before and not (place / "out").exists()


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(place, tiny_model, monkeypatch):
    before = files(place)
    for out in ("out", None):
        with monkeypatch.context() as patch:
            at_step(patch, 1, lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                start(tiny_model, "out", *(["--out", "runs/x"] if out is None else []))
        assert files(place) == before and not (place / "out").exists() and not (place / "runs").exists()


def test_a_run_that_goes_on_refuses_what_is_new(place, tiny_model, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        (place / "set.tsv").write_text("1\ta\tb\n2\tc\td\n3\te\tf\n")
        start(tiny_model, "out", "--eval-file", "set.tsv")
    kept = files(place / "out")
    text, scored = (place / "text.txt").read_text(), (place / "set.tsv").read_text()
    for arguments, words in (
        (["--lr", 0.1], "--resume out: that run has --lr 0.001, not 0.1; leave it out"),
        (["--recipe", "simcse"], "--recipe focal, not simcse"),
        (["--eval-file", "text.txt"], "--eval-file"),
        (["--keep", "best"], "--keep last, not best"),
        (["--config", "out/run.toml"], "--config and --resume exclude each other"),
        (["--out", "other"], "--resume and --out exclude each other"),
    ):
        code, _, stderr = pycse("train", "--resume", "out", *arguments)
        assert code == 2 and words in stderr and stderr.count("\n") == 1, stderr
    code, _, stderr = pycse("sparsify", "--resume", "out")
    assert code == 2
    for path, content, words in (
        ("text.txt", text + "one more\n", "the text"),
        ("set.tsv", scored.replace("2\t", "4\t"), "the evaluation set set has changed"),
    ):
        was = (place / path).read_text()
        (place / path).write_text(content)
        code, _, stderr = pycse("train", "--resume", "out")
        assert code == 2 and words in stderr and "start a new run" in stderr, stderr
        (place / path).write_text(was)
    assert files(place / "out") == kept
    for folder, words in (("nowhere", "is no folder"), (".", "has no run.json")):
        code, _, stderr = pycse("train", "--resume", folder)
        assert code == 2 and words in stderr


def test_what_a_pipe_gave_is_kept(place, tiny_model):
    code = (
        f"import sys; sys.path[:0] = [{str(HELPERS)!r}, {str(Path(__file__).parent)!r}]\n"
        "import os, signal, pytest, test_stopped_runs as t\n"
        f"with pytest.MonkeyPatch.context() as patch:\n"
        "    t.at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        f"    code, out, err = t.start({tiny_model!r}, 'out', '--train-file', '/dev/stdin')\n"
        "print(code, err)\n"
        "print(*t.pycse('train', '--resume', 'out'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(SENTENCES), capture_output=True, text=True, cwd=place
    )
    assert done.stdout.startswith("143 "), done.stdout + done.stderr
    assert "\n0 " in done.stdout and (place / "out" / "model").is_dir(), done.stdout


def test_a_signal_while_the_model_is_saved_waits_for_it(place, tiny_model, monkeypatch):
    from pycse.training import train

    save = train.save_model
    monkeypatch.setattr(train, "save_model", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), save(*a)))
    code, _, stderr = start(tiny_model, "out")
    assert code == 143 and "the run had ended" in stderr
    assert (place / "out" / "model").is_dir() and json.loads((place / "out" / "run.json").read_text())["ended"]


def test_signals_of_a_terminal_that_has_gone(monkeypatch):
    """Nothing can be printed, and a SIGHUP that nohup ignores stays ignored."""
    from pycse.training import signals

    class Gone:
        def write(self, _):
            raise OSError(5, "Input/output error")

        flush = write

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, signals.received(), signals.noted():
            patch.setattr(sys, "stderr", Gone())
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.caught() == signal.SIGTERM
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # a second one ends at once
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGINT, interrupt)
    assert signals.caught() == 0


def test_phases_and_their_checkpoints(tmp_path):
    from pycse.training.checkpoints import Checkpoints
    from pycse.training.fit import STATE, is_complete
    from pycse.training.folder import clean

    clock = Checkpoints(tmp_path / "checkpoints", "train")
    clock.saved -= 3600
    assert clock.due(1)
    clock.begin()  # also where it then fails, and on ranks that write nothing
    assert not clock.due(1)

    # The name was being given to a new checkpoint of the same step.
    (tmp_path / "checkpoints" / ".old-a" / "train-4").mkdir(parents=True)
    clean(tmp_path)
    assert clock.latest() == tmp_path / "checkpoints" / "train-4" and not list(tmp_path.rglob(".old-*"))

    course = {"complete": False, "since": 2}
    state = {"stateful_callbacks": {"Course": {"attributes": course}}}
    (clock.latest() / STATE).write_text(json.dumps(state))
    assert [is_complete(clock.latest(), patience) for patience in (None, 3, 2)] == [False, False, True]


def test_plain_lines_of_a_training(monkeypatch):
    """Rows a second are those of the steps, the time left also that of evaluations."""
    from pycse.training import progress

    clock, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = progress.Lines(type("Console", (), {"print": lambda _, text: said.append(text)})(), 4, rows=10)
    for now, arguments in ((8, (0, "", "lee 0.1")), (10, (1, "loss 3")), (40, (1, "", "lee 0.2")), (42, (2, "loss 2"))):
        clock[0] = now
        lines.update(*arguments)
    assert said == ["step 0/4, lee 0.1", "step 1/4, loss 3, lee 0.2, 5 rows/s, 2:00 left"]
    clock[0] = 60
    lines.update(3, "loss 1")
    assert said[-1] == "step 3/4, loss 1, 1 rows/s, 0:20 left"


def test_steps_of_epochs_count_batches_that_are_added_up():
    from collections import Counter

    from pycse.training.data import Text
    from pycse.training.prepare import step_count
    from pycse.training.settings import Settings

    text = Text("a", [(str(i),) for i in range(100)], Counter())
    for accumulation, steps in ((1, 30), (4, 9), (10, 3), (50, 3)):
        settings = Settings(batch_size=10, epochs=3, grad_accumulation=accumulation)
        assert step_count(settings, text) == steps


# ---- kill -9


def test_a_kill_at_any_point_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HELPERS / "torture.py"), "--points", "6", "--seed", "3"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0 and "6 passed, 0 failed" in done.stdout, done.stdout + done.stderr


# ---- one folder, two runs


def test_a_folder_belongs_to_one_run(place, tiny_model, monkeypatch):
    """The second starts while the first trains."""
    seen = []
    with monkeypatch.context() as patch:
        at_step(
            patch, 1, lambda: (patch.undo(), seen.extend([start(tiny_model, "out"), pycse("train", "--resume", "out")]))
        )
        code, _, stderr = start(tiny_model, "out")
    assert code == 0, stderr
    (first, _, said), (second, _, refused) = seen
    assert first == 2 and "out has content" in said
    assert second == 2 and "another run writes to out" in refused


def test_default_folders_never_meet(tmp_path, monkeypatch):
    from pycse.training.folder import claim

    monkeypatch.chdir(tmp_path)
    with claim(Path("runs/a"), False, "", {}) as first, claim(Path("runs/a"), False, "", {}) as second:
        assert (first.path, second.path) == (Path("runs/a"), Path("runs/a-2"))


# ---- a loss that is not finite


@pytest.mark.parametrize("more", [[], ["--static", 16, "--dims", "16", "--recipe", "simcse", "--positives", "next"]])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_weights(place, tiny_model, more):
    from sentence_transformers import SentenceTransformer

    # At the end of the warm-up a weight times 1e38 is past float32.
    code, _, stderr = start(tiny_model, "out", *more, "--lr", 3e38, "--weight-decay", 3e38, "--max-grad-norm", 1.0)
    assert code == 1, stderr
    last = stderr.strip().splitlines()[-1]
    assert "learning rate" in last and "last-good-model" in last and "Try a lower --lr" in last
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    assert metrics["failed"] and not metrics["better"]
    SentenceTransformer(str(place / "out" / "last-good-model"), device="cpu").encode("a")
    assert not (place / "out" / "model").exists()


def test_what_a_run_would_take(place, tiny_model):
    before = files(place)
    code, stdout, stderr = start(tiny_model, "out", "--steps", 1000, "--dry-run")
    assert code == 0, stderr
    for words in ("kept: sentences", "rows a second", "1000: ", "without loading and saving", "GB", "nothing"):
        assert words in stdout
    assert files(place) == before and not (place / "out").exists()


# ---- disks


def test_a_full_disk_loses_no_weights(place, tiny_model, monkeypatch):
    """A limit on files' sizes acts as a full disk does, for Python and for Rust."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    temporary = place / "elsewhere"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    from pycse.training import folder

    staged = folder.staged

    def full(target):
        if target.name == "model":
            raise OSError(28, "No space left on device")
        return staged(target)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # checkpoints are larger
        with monkeypatch.context() as patch:
            patch.setattr(folder, "staged", full)
            patch.setattr("pycse.training.train.save_model", lifted(limits))
            code, stdout, stderr = start(tiny_model, "out", "--save-steps", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "a checkpoint could not be written" in stdout
    assert code == 2 and "No space left on device" in stderr and stderr.count("pycse train: error") == 1
    rescued = next(temporary.glob("pycse-model-*"))
    assert str(rescued) in stderr and (rescued / "model.safetensors").stat().st_size > 20_000
    assert not (place / "out" / "model").exists()


def lifted(limits):
    from pycse.training.saving import save_model

    def save(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        save_model(*arguments)

    return save


def test_a_full_disk_is_known_from_libraries_words(tmp_path):
    import torch

    from pycse.training.folder import is_of_disk

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(Exception) as caught:
            torch.save(torch.ones(10_000, dtype=torch.float32, device="cpu"), tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_of_disk(caught.value) and not is_of_disk(ValueError("no"))


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def test_what_cannot_be_measured_or_kept_costs_no_model(place, tiny_model, monkeypatch):
    from pycse.training import pruning
    from pycse.training.trainer import Course

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "write_model", no_space)
        code, stdout, stderr = start(tiny_model, "sparse", "--score-batches", 1, command="sparsify")
    assert code == 0 and "sizes could not be measured (No space left on device)" in stdout, stderr
    assert (place / "sparse" / "model").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(Course, "save_best", no_space)
        code, stdout, stderr = start(tiny_model, "best", "--keep", "best")
    assert code == 0 and "a checkpoint could not be written" in stdout, stderr
    assert (place / "best" / "model").is_dir()


def test_a_model_that_is_another_when_loaded_is_kept_apart(place, tiny_model, monkeypatch):
    from pycse.training import train
    from pycse.training.errors import UserError

    save = train.save_model

    def refuse(encoder, folder, *more):
        save(encoder, folder, *more)
        raise UserError(f"the model in {folder} is another one")

    monkeypatch.setattr(train, "save_model", refuse)
    code, _, stderr = start(tiny_model, "out")
    assert code == 2 and "the model in out/model-refused is another one" in stderr
    assert (place / "out" / "model-refused" / "model.safetensors").exists() and not (place / "out" / "model").exists()
    assert "another one" in json.loads((place / "out" / "metrics.json").read_text())["failed"]


def test_a_teachers_cache_on_a_full_disk(tiny_model, tmp_path, monkeypatch):
    import torch
    from sentence_transformers import SentenceTransformer

    from pycse.embedding_cache import CacheError
    from pycse.sentence_transformers import CachedTeacher

    teacher = CachedTeacher(SentenceTransformer(tiny_model, device="cpu"), tmp_path / "cache")
    expected = teacher(["a", "b"])

    def add(*_):
        raise CacheError("cannot write it (No space left on device)")

    monkeypatch.setattr(teacher.cache, "add", add)
    with pytest.warns(UserWarning, match="No space left on device"):
        found = teacher(["a", "c"])
    assert torch.equal(found[0], expected[0]) and found.isfinite().all()


def test_a_folder_that_vanishes(place, tiny_model, monkeypatch):
    at_step(monkeypatch, 3, lambda: shutil.rmtree(place / "out"))
    code, _, stderr = start(tiny_model, "out", "--steps", 3)
    assert code in (0, 2) and "Traceback" not in stderr
    assert code == 0 or "weights" in stderr or "cannot write" in stderr


@pytest.mark.parametrize(
    "out, words",
    [
        ("x" * 300, "File name too long"),
        ("/".join(["y" * 200] * 30), "File name too long"),
        ("dangling", "is a link to nothing"),
        ("text.txt/out", "cannot write in"),
        ("/proc/out", "cannot write"),
    ],
)
def test_folders_that_cannot_be(place, tiny_model, out, words):
    (place / "dangling").symlink_to("nowhere/at/all")
    before = files(place)
    code, _, stderr = start(tiny_model, out)
    assert code == 2 and words in stderr and stderr.count("\n") == 1, stderr
    assert files(place) == before


def test_the_home_folder_has_one_name(place, tiny_model, monkeypatch):
    from pycse.training.settings import Settings

    monkeypatch.setenv("HOME", str(place))
    settings = Settings(out="~/x", train_file="~/text.txt", teachers=("~/a", "b"), eval_files=("~/set.tsv",))
    assert settings.out == str(place / "x") and settings.train_file == str(place / "text.txt")
    assert Settings(out="~nobody-has-this-name/x").out == "~nobody-has-this-name/x"
    assert settings.teachers == (str(place / "a"), "b") and settings.eval_files == (str(place / "set.tsv"),)


# ---- settings from a file, the best weights


def test_a_file_of_settings_repeats_a_run(place, tiny_model):
    code, _, stderr = start(tiny_model, "a", "--save-steps", 3)
    assert code == 0, stderr
    code, _, stderr = pycse("train", "--config", "a/run.toml", "--out", "b")
    assert code == 0, stderr
    assert results(place / "a") == results(place / "b")
    assert (place / "a" / "run.toml").read_text() == (place / "b" / "run.toml").read_text()


@pytest.mark.parametrize(
    "content, words",
    [
        ("lr = 'fast'", "lr is 'fast', which is not of its kind"),
        ("lrr = 1", "lrr is no option of pycse train; did you mean lr?"),
        ("lr = ", "is no TOML"),
        ("span = [1]", "span is [1]"),
        ("eval-file = 'set.tsv'", "eval-file is 'set.tsv'"),
        (None, "cannot read"),
    ],
)
def test_a_file_of_settings_that_cannot_be_used(place, content, words):
    if content is not None:
        (place / "run.toml").write_text(content)
    code, _, stderr = pycse("train", "--config", "run.toml")
    assert code == 2 and words in stderr and stderr.count("\n") == 1, stderr


def test_the_best_weights_are_kept_and_the_training_stops(place, tiny_model):
    """With a rate that ruins the encoder, the first evaluation stays the best."""
    from sentence_transformers import SentenceTransformer

    (place / "set.tsv").write_text("".join(f"{i % 6}\t{SENTENCES[i]}\t{SENTENCES[-1 - i // 2]}\n" for i in range(12)))
    code, stdout, stderr = start(
        tiny_model, "out", "--steps", 8, "--eval-steps", 1, "--keep", "best", "--patience", 2, "--eval-file", "set.tsv",
        "--best-by", "lee", "--lr", 0.05,
    )  # fmt: skip
    assert code == 0, stderr
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    scores = {entry["step"]: entry["scores"]["lee"]["spearman"] for entry in metrics["history"]["scores"]}
    best = max((step for step in scores if step), key=lambda step: (scores[step], -step))
    assert metrics["kept_step"] == best and metrics["after"]["lee"]["spearman"] == scores[best]
    assert metrics["steps"] == max(scores)
    assert metrics["steps"] == 8 or (metrics["steps"] == best + 2 and "2 evaluations without a better one" in stdout)
    code, stdout, _ = pycse("eval", "out/model", "--device", "cpu", "--json", "scores.json")
    assert code == 0
    again = json.loads((place / "scores.json").read_text())["scores"]["lee"]["spearman"]
    assert again == pytest.approx(scores[best], abs=1e-6)
    SentenceTransformer(str(place / "out" / "checkpoints" / f"train-best-{best}"), device="cpu")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--patience", 2], "--patience belongs to --keep best"),
        (["--keep", "first"], "--keep first: unknown"),
        (["--keep", "best", "--best-by", "other"], "--best-by other"),
        (["--schedule", "wavy"], "--schedule wavy: unknown"),
        (["--save-steps", 0], "--save-steps is 0"),
        (["--grad-accumulation", 0], "--grad-accumulation is 0"),
        (["--cached", 4], "--cached is 4, and a batch has 4 rows"),
        (["--report-to", "paper"], "--report-to paper: unknown"),
        (["--report-to", "mlflow"], "--report-to mlflow"),
        (["--static", 16, "--cached", 2], "--cached does not go with --static"),
    ],
)
def test_bad_settings_of_a_course(place, tiny_model, arguments, words):
    code, _, stderr = start(tiny_model, "out", *arguments)
    assert code == 2 and words in stderr and stderr.count("\n") == 1, stderr


@pytest.mark.parametrize(
    "more", [["--cached", 2], ["--gradient-checkpointing"], ["--schedule", "cosine"], ["--workers", 1]]
)
def test_ways_to_train(place, tiny_model, more):
    """The same steps: GradCache, checkpointed activations and workers change no loss of the first step."""
    for out, arguments in (("a", []), ("b", more)):
        code, _, stderr = start(tiny_model, out, "--steps", 2, "--train-file", "triples.txt", *arguments)
        assert code == 0, stderr
    first = [json.loads((place / out / "metrics.json").read_text())["history"]["loss"][0] for out in ("a", "b")]
    assert set(first[0]) >= {"loss", "learning_rate", "gradient"}
    if more[0] != "--cached":  # which draws other dropout masks
        assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
