# ruff: noqa: F811 (the fixture is an argument)
"""The `pycse` command as a user meets it: a whole small run, what it writes, and one line for bad input."""

import json
import subprocess
import sys

import pytest
from tiny_models import needs_extras, tiny_model  # noqa: F401 (a fixture)

from pycse.training import errors

SENTENCES = [
    f"the {a} {b} is in the {c}" for a in ("red", "old", "big") for b in ("cat", "ship") for c in ("sea", "sun")
]
PAIRS = "".join(f"{i % 6}\t{SENTENCES[i]}\t{SENTENCES[-1 - i // 2]}\n" for i in range(12))


def pycse(*arguments):
    """Run the command in this process: (exit code, stdout, stderr)."""
    from typer.testing import CliRunner

    from pycse.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="pycse")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def files(folder):
    """Every file below a folder and its content."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    """A current folder with a text, an evaluation file, and the environment restored afterwards."""
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "120")
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "text.txt").write_text("\n".join(SENTENCES) + "\n")
    (folder / "triples.txt").write_text("".join(f"{s}\t{s} now\tno {s[::-1]}\n" for s in SENTENCES))
    (folder / "set.tsv").write_text("score\tsentence1\tsentence2\n" + PAIRS)
    monkeypatch.chdir(folder)
    return folder


def run(place, tiny_model, out, *more):
    return pycse(
        "train", "--model", tiny_model, "--train-file", place / "text.txt", "--out", place / out, "--device", "cpu",
        "--recipe", "focal", "--batch-size", 4, "--steps", 3, "--eval-steps", 2, "--max-length", 16, "--lr", 0.001, *more,
    )  # fmt: skip


@needs_extras
def test_a_run_and_all_that_it_writes(place, tiny_model):
    from sentence_transformers import SentenceTransformer

    before = files(place)
    code, stdout, stderr = run(place, tiny_model, "out", "--layers", "0,2", "--eval-file", place / "set.tsv")
    assert code == 0, stderr
    for expected in ("kept: sentences", "loss over 3 steps", "spearman", "alignment", "uniformity", "The run made"):
        assert expected in stdout
    out = place / "out"
    assert {path.name for path in out.iterdir()} == {"model", "metrics.json", "curves.png", "run.toml", "run.json"}
    assert {path: content for path, content in files(place).items() if path.parts[0] != "out"} == before

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["settings"]["recipe"] == "focal" and metrics["settings"]["m"] == 0.3
    assert metrics["model"]["layers"] == [0, 2] and metrics["model"]["layers_before"] == 4
    assert (
        metrics["text"]["columns"] == ["sentence"]
        and metrics["text"]["kept"] == len(SENTENCES)
        and not metrics["text"]["dropped"]
    )
    assert [entry["step"] for entry in metrics["history"]["loss"]] == [1, 2, 3]
    assert all(entry["loss"] > 0 for entry in metrics["history"]["loss"])
    assert [entry["step"] for entry in metrics["history"]["scores"]] == [0, 2, 3]
    assert metrics["history"]["scores"][0]["scores"] == metrics["before"] != metrics["after"]
    for scores in (metrics["before"], metrics["after"]):
        assert set(scores) == {"lee", "set"}
        for measures in scores.values():
            assert set(measures) == {"spearman", "alignment", "uniformity"}
            assert -1 <= measures["spearman"] <= 1 and measures["alignment"] >= 0 >= measures["uniformity"]
    assert metrics["better"] == all(
        metrics["after"][name]["spearman"] > metrics["before"][name]["spearman"] for name in ("lee", "set")
    )
    assert metrics["seconds"]["total"] > metrics["seconds"]["train"] > 0

    from matplotlib.image import imread

    picture = imread(out / "curves.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 500 and picture[..., :3].std() > 0.05

    # The saved model is the trained one: it loads by itself, with two layers, and scores what the run printed.
    model = SentenceTransformer(str(out / "model"), device="cpu")
    assert len(model[0].auto_model.encoder.layer) == 2
    code, stdout, stderr = pycse(
        "eval", out / "model", "--eval-file", place / "set.tsv", "--device", "cpu", "--json", place / "scores.json"
    )
    assert code == 0, stderr
    again = json.loads((place / "scores.json").read_text())["scores"]
    for name, measures in metrics["after"].items():
        assert f"{measures['spearman']:.4f}" in stdout
        assert again[name] == pytest.approx(measures, rel=1e-5)


@needs_extras
def test_default_text_is_paired_with_the_next_sentence(place, tiny_model):
    from pycse.training.prepare import prepare
    from pycse.training.settings import Settings

    default = {"model": tiny_model, "recipe": "focal"}
    own = default | {"train_file": str(place / "text.txt"), "batch_size": 4}
    for arguments, columns in (
        (default, ("sentence", "positive")),
        (default | {"positives": "dropout"}, ("sentence",)),
        (default | {"recipe": "distillcse", "layers": "0,2"}, ("sentence", "positive")),
        (own, ("sentence",)),
        (own | {"positives": "next"}, ("sentence", "positive")),
    ):
        assert prepare(Settings(**arguments))[2].columns == columns


@needs_extras
def test_saved_model_gives_equal_embeddings(place, tiny_model):
    from rich.console import Console
    from sentence_transformers import SentenceTransformer

    from pycse.training import train as training
    from pycse.training.settings import Settings

    kept = []
    load = training.load_encoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training, "load_encoder", lambda *given, **options: kept.append(load(*given, **options)) or kept[0]
        )
        settings = Settings(
            model=tiny_model, train_file=str(place / "triples.txt"), out=str(place / "out"), recipe="simcse",
            hard_negative_weight=0.5, layers="1,2,3", batch_size=4, steps=2, lr=1e-2, device="cpu",
        )  # fmt: skip
        training.train(settings, Console(quiet=True))
    trained = kept[0].encode(SENTENCES)
    assert (trained == SentenceTransformer(str(place / "out" / "model"), device="cpu").encode(SENTENCES)).all()
    assert abs(trained - load(tiny_model, "cpu").encode(SENTENCES)).max() > 1e-3


@needs_extras
def test_the_same_seed_gives_the_same_run(place, tiny_model):
    results = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, _, stderr = run(place, tiny_model, out, "--seed", seed)
        assert code == 0, stderr
        metrics = json.loads((place / out / "metrics.json").read_text())
        results.append((metrics["history"], (place / out / "model" / "model.safetensors").read_bytes()))
    assert results[0] == results[1]
    assert results[0][0]["loss"] != results[2][0]["loss"] and results[0][1] != results[2][1]


@needs_extras
def test_a_run_that_made_it_worse_says_so(place, tiny_model):
    from pycse.training.report import verdict

    up, down = ({"s": {"spearman": value}} for value in (0.6, 0.5))
    assert verdict(down, up) == (True, "The run made the model better on s (0.5000 -> 0.6000).")
    assert verdict(up, down) == (False, "The run made the model worse, or no better, on s (0.6000 -> 0.5000).")
    assert not verdict(up, {"s": {"spearman": float("nan")}})[0]
    code, stdout, stderr = run(place, tiny_model, "out", "--lr", 100)
    assert code == 0, stderr
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    assert metrics["verdict"] in " ".join(stdout.split())
    after = metrics["after"]["lee"]["spearman"]  # null where the run collapsed
    assert metrics["better"] == (after is not None and after > metrics["before"]["lee"]["spearman"])
    assert after is not None or "there is no Spearman" in metrics["verdict"]


def spoil(place, tiny_model):
    """Broken inputs for the cases below."""
    (place / "empty.txt").write_text("")
    (place / "few.txt").write_text("one\ntwo\n")
    (place / "ragged.txt").write_text("a\tb\nc\n")
    (place / "bad.tsv").write_text("1\ta\tb\nhigh\tc\td\n")
    (place / "hollow").mkdir()
    (place / "broken").mkdir()
    (place / "broken" / "config.json").write_text("{}")
    (place / "full").mkdir()
    (place / "full" / "keep.txt").write_text("keep")


BAD = {
    "missing text": (["--train-file", "absent.txt"], "no such file: absent.txt"),
    "empty text": (["--train-file", "empty.txt"], "empty.txt is empty"),
    "few sentences": (["--train-file", "few.txt"], "2 usable lines, fewer than a batch of 4"),
    "ragged text": (["--train-file", "ragged.txt"], "ragged.txt, line 2"),
    "missing evaluation": (["--eval-file", "absent.tsv"], "no such file: absent.tsv"),
    "bad evaluation": (["--eval-file", "bad.tsv"], "bad.tsv, line 2"),
    "no model": (["--model", "hollow"], "hollow is no model"),
    "broken model": (["--model", "broken"], "cannot load the model broken"),
    "absent model": (["--model", "./absent"], "no such model folder: ./absent"),
    "full folder": (["--out", "full"], "full has content"),
    "folder is a file": (["--out", "text.txt"], "text.txt is a file"),
    "layer too high": (["--layers", "0,9"], "layers 0 to 3"),
    "layers unreadable": (["--layers", "first"], "--layers 'first'"),
    "temperature": (["--temperature", "0"], "--temperature is 0"),
    "recipe": (["--recipe", "magic"], "--recipe magic"),
    "backend": (["--backend", "abacus"], "backend"),
    "too long": (["--max-length", "65"], "at most 64 tokens"),
    "next of pairs": (["--train-file", "triples.txt", "--positives", "next"], "already has pairs"),
    "hard negatives": (["--hard-negative-weight", "1"], "third column"),
}


@needs_extras
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(place, tiny_model, case):
    arguments, words = BAD[case]
    spoil(place, tiny_model)
    before = files(place)
    code, _, stderr = run(place, tiny_model, "out", *arguments)  # the later of two equal options counts
    assert code == 2
    assert stderr.startswith("pycse train: error: ") and words in stderr
    assert stderr.count("\n") == 1 and "Traceback" not in stderr
    assert files(place) == before and not (place / "out").exists()


@needs_extras
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["hollow"], "hollow is no model"),
        (["MODEL", "--eval-file", "bad.tsv"], "bad.tsv, line 2"),
        (["MODEL", "--layers", "7"], "layers 0 to 3"),
        (["MODEL", "--json", "text.txt"], "text.txt exists"),
        (["MODEL", "--json", "nowhere/scores.json"], "there is no folder nowhere"),
    ],
)
def test_bad_input_to_eval(place, tiny_model, arguments, words):
    spoil(place, tiny_model)
    before = files(place)
    code, _, stderr = pycse("eval", *[tiny_model if word == "MODEL" else word for word in arguments])
    assert code == 2
    assert stderr.startswith("pycse eval: error: ") and words in stderr and stderr.count("\n") == 1
    assert files(place) == before


def test_missing_extras_name_the_install_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors, "EXTRAS", ("a_module_that_nobody_has",))
    for arguments in (["train"], ["eval", "some/encoder"]):
        code, _, stderr = pycse(*arguments)
        assert code == 2
        assert stderr == (
            f"pycse {arguments[0]}: error: a_module_that_nobody_has not installed; "
            "run: pip install 'pycse-kernels[train]'\n"
        )
    assert not list(tmp_path.iterdir())


def test_help_names_the_commands_and_their_options():
    code, stdout, _ = pycse("--help")
    assert code == 0 and all(command in stdout for command in ("info", "train", "sparsify", "eval"))
    code, stdout, _ = pycse("train", "--help")
    assert code == 0 and all(option in stdout for option in ("--model", "--train-file", "--eval-file", "--recipe"))


def test_info_lists_the_backends():
    code, stdout, _ = pycse("info")
    assert code == 0 and "reference" in stdout and "torch" in stdout


def test_the_command_is_light_and_exits_with_2(tmp_path):
    heavy = ["torch", "numpy", "transformers", "sentence_transformers", "datasets", "gensim", "matplotlib"]
    code = f"import sys, pycse.cli; print([name for name in {heavy} if name in sys.modules]); pycse.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--lr", "-1"], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 2 and done.stdout == "[]\n"
    assert done.stderr == "pycse train: error: --lr is -1; it must be a finite number above 0\n"
