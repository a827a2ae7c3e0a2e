# ruff: noqa: F811 (fixtures are arguments)
"""`pycse sparsify` and `pycse train --recipe sparsecse`: whole small runs, what they write, one line for bad input."""

import json

import pytest
from test_cli import files, place, pycse, run, spoil  # noqa: F401 (a fixture)
from tiny_models import make_model, needs_extras, tiny_model  # noqa: F401 (fixtures)

from pycse.training.choices import n_of_m
from pycse.training.settings import Settings

torch = pytest.importorskip("torch")

LEFT = {"model", "metrics.json", "layers.png", "run.toml", "run.json"}  # in a run's folder


def sparsified(place, tiny_model, out, *more):
    return pycse(
        "sparsify", tiny_model, "--train-file", place / "text.txt", "--out", place / out, "--device", "cpu",
        "--batch-size", 4, "--score-batches", 2, "--max-length", 16, *more,
    )  # fmt: skip


def metrics_of(place, out):
    return json.loads((place / out / "metrics.json").read_text())


@needs_extras
@pytest.mark.parametrize("granularity", ["weight", "2:4", "block", "head", "neuron"])
def test_sparsify_writes_a_smaller_encoder(place, tiny_model, granularity):
    from pycse.sparse import SparseLinear, load

    share = () if granularity == "2:4" else ("--sparsity", 0.5)
    more = ("--block", 16) if granularity == "block" else ()
    before = files(place)
    code, stdout, stderr = sparsified(
        place, tiny_model, "out", "--granularity", granularity, *share, *more, "--eval-file", place / "set.tsv"
    )
    assert code == 0, stderr
    for expected in ("removed", "sparse", "spearman", "uniformity", "sentences a second", "on disk", "The run made"):
        assert expected in stdout
    assert {path.name for path in (place / "out").iterdir()} == LEFT
    assert {path: content for path, content in files(place).items() if path.parts[0] != "out"} == before
    metrics = metrics_of(place, "out")
    pruning = metrics["pruning"]
    report, size = pruning["report"], pruning["size"]
    assert report["removed"] == (report["kept"] + report["removed"]) / 2
    assert size["after"]["nonzero"] == report["nonzero_after"] < report["nonzero_before"] == size["before"]["nonzero"]
    assert size["after"]["parameters"] == report["parameters_after"]
    smaller = granularity in ("head", "neuron")
    assert (size["after"]["megabytes"] < size["before"]["megabytes"]) == smaller
    assert size["before"]["sentences_a_second"] > 0 < size["after"]["sentences_a_second"]
    assert pruning["tuned"] is None and metrics["after"] == pruning["sparse"] and metrics["before"] == pruning["dense"]

    encoder = load(place / "out" / "model", "cpu")
    assert any(isinstance(module, SparseLinear) for module in encoder.modules()) != smaller
    code, _, stderr = pycse(
        "eval", place / "out" / "model", "--eval-file", place / "set.tsv", "--device", "cpu", "--json", place / "s.json"
    )
    assert code == 0, stderr
    again = json.loads((place / "s.json").read_text())["scores"]
    for name, measures in metrics["after"].items():
        assert again[name] == pytest.approx(measures, rel=1e-4)


@needs_extras
@pytest.mark.parametrize("recipe", ["distillcse", "simcse"])
def test_sparsify_trains_what_is_left(place, tiny_model, recipe):
    from pycse.sparse import load

    code, stdout, stderr = sparsified(
        place, tiny_model, "out", "--sparsity", 0.6, "--finetune-steps", 3, "--recipe", recipe, "--lr", 0.01
    )
    assert code == 0, stderr
    assert "fine-tuned" in stdout and "loss over 3 steps" in stdout
    assert {path.name for path in (place / "out").iterdir()} == LEFT | {"curves.png"}
    metrics = metrics_of(place, "out")
    pruning = metrics["pruning"]
    assert pruning["tuned"] == metrics["after"] != pruning["sparse"]
    assert [entry["step"] for entry in metrics["history"]["loss"]] == [1, 2, 3]
    assert [teacher["name"] for teacher in metrics["teachers"]] == (
        [f"{tiny_model}, before the removal"] if recipe == "distillcse" else []
    )
    # Zeros are where they were.
    encoder = load(place / "out" / "model", "cpu")
    removed = sum(int((~m.mask).sum()) for m in encoder.modules() if hasattr(m, "mask"))
    assert removed == pruning["report"]["removed"]
    assert sum(int((m.weight == 0).sum()) for m in encoder.modules() if hasattr(m, "mask")) == removed


@needs_extras
def test_the_recipe_trains_removes_and_trains_again(place, tiny_model):
    code, stdout, stderr = run(
        place, tiny_model, "out", "--recipe", "sparsecse", "--sparsity", 0.4, "--steps", 4, "--score-batches", 2
    )
    assert code == 0, stderr
    for heading in ("before", "trained", "sparse", "fine-tuned"):
        assert heading in stdout
    metrics = metrics_of(place, "out")
    assert [entry["step"] for entry in metrics["history"]["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in metrics["history"]["scores"]] == [0, 2, 4, 4, 6]
    history = {entry["step"]: entry["scores"] for entry in metrics["history"]["scores"]}
    pruning = metrics["pruning"]
    assert history[4] == pruning["sparse"] != pruning["dense"]
    assert pruning["dense"] == metrics["history"]["scores"][2]["scores"]
    assert pruning["tuned"] == metrics["after"] == history[6]
    assert metrics["settings"]["sparsity"] == 0.4 and metrics["settings"]["granularity"] == "weight"
    assert {path.name for path in (place / "out").iterdir()} == LEFT | {"curves.png", "checkpoints"}
    code, stdout, stderr = run(
        place, tiny_model, "again", "--recipe", "sparsecse", "--granularity", "neuron", "--finetune-steps", 0
    )
    assert code == 0, stderr
    assert metrics_of(place, "again")["pruning"]["tuned"] is None


@needs_extras
def test_a_sparse_encoder_can_be_cut_and_trained_on(place, tiny_model):
    code, _, stderr = sparsified(place, tiny_model, "heads", "--granularity", "head", "--sparsity", 0.5)
    assert code == 0, stderr
    code, _, stderr = run(place, place / "heads" / "model", "cut", "--layers", "0,2")
    assert code == 0, stderr
    code, _, stderr = pycse("eval", place / "cut" / "model", "--device", "cpu")
    assert code == 0, stderr
    code, _, stderr = sparsified(place, place / "cut" / "model", "sparse", "--sparsity", 0.3)
    assert code == 0, stderr


@needs_extras
def test_pairs_of_the_user_are_the_positives(place, tiny_model):
    from pycse.training.data import read_train_file
    from pycse.training.pruning import batches

    (place / "pairs.txt").write_text("".join(f"a{i}\tb{i}\n" for i in range(9)))
    pairs, single = (read_train_file(place / name) for name in ("pairs.txt", "text.txt"))
    own = Settings(train_file="pairs.txt", batch_size=4, prunes=True, seed=1)
    drawn = batches(own, pairs)
    assert len(drawn) == 2 and all(len(first) == len(second) == 4 for first, second in drawn)
    assert all(a[1:] == b[1:] for first, second in drawn for a, b in zip(first, second))
    assert all(isinstance(text, str) for batch in batches(own, single) for text in batch)
    default = Settings(batch_size=4, prunes=True, score_batches=1)
    assert len(batches(default, pairs)) == 1 and isinstance(batches(default, pairs)[0][0], str)


def test_n_of_m():
    assert n_of_m("2:4") == (2, 4) and n_of_m("1:1") == (1, 1)
    assert [n_of_m(text) for text in ("n:m", "4:2", "0:4", "2:4:8", "weight", "-1:2")] == [None] * 6


BAD = {
    "share": (["--sparsity", "1"], "--sparsity is 1"),
    "granularity": (["--granularity", "row"], "--granularity row: unknown"),
    "letters": (["--granularity", "n:m"], "as in 2:4"),
    "n above m": (["--granularity", "4:2"], "1 <= n <= m"),
    "share of n:m": (["--granularity", "2:4", "--sparsity", "0.4"], "contradicts --granularity 2:4"),
    "scope of n:m": (["--granularity", "2:4", "--scope", "global"], "--scope global contradicts"),
    "m that divides nothing": (["--granularity", "2:7"], "multiple of m = 7"),
    "block that divides nothing": (["--granularity", "block", "--block", "48"], "multiples of the block 48"),
    "block of weights": (["--block", "16"], "--block belongs to --granularity block"),
    "scope": (["--scope", "local"], "--scope local: unknown"),
    "means": (["--means", "median"], "--means median: unknown"),
    "balance": (["--balance", "2"], "--balance is 2"),
    "batches": (["--score-batches", "0"], "--score-batches is 0"),
    "steps": (["--finetune-steps", "-1"], "--finetune-steps is -1"),
    "recipe": (["--recipe", "sparsecse"], "use it with pycse train"),
    "unknown recipe": (["--recipe", "magic"], "--recipe magic: unknown"),
    "every head": (["--granularity", "head", "--sparsity", "0.9"], "keeps at least 1"),
    "missing text": (["--train-file", "absent.txt"], "no such file"),
    "few sentences": (["--train-file", "few.txt"], "fewer than a batch"),
    "full folder": (["--out", "full"], "has content"),
}


@needs_extras
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(place, tiny_model, case):
    arguments, words = BAD[case]
    spoil(place, tiny_model)
    before = files(place)
    code, _, stderr = sparsified(place, tiny_model, "out", *arguments)
    assert code == 2, stderr
    assert stderr.startswith("pycse sparsify: error: ") and words in stderr and stderr.count("\n") == 1
    assert files(place) == before and not (place / "out").exists()


@needs_extras
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--recipe", "focal", "--sparsity", "0.1"], "--sparsity does not belong to --recipe focal"),
        (["--recipe", "sparsecse", "--granularity", "2:7"], "multiple of m = 7"),
        (["--recipe", "sparsecse", "--teacher", "x"], "takes no --teacher"),
    ],
)
def test_bad_input_to_the_recipe(place, tiny_model, arguments, words):
    before = files(place)
    code, _, stderr = run(place, tiny_model, "out", *arguments)
    assert code == 2 and words in stderr and stderr.count("\n") == 1
    assert files(place) == before


@needs_extras
def test_an_encoder_without_dropout(place, tmp_path_factory):
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_size": 32}
    model = make_model(tmp_path_factory, "abcdefghijklmnopqrstuvwxyz", seed=2, **calm)
    code, _, stderr = sparsified(place, model, "out")
    assert code == 2 and "no dropout" in stderr and stderr.count("\n") == 1 and not (place / "out").exists()
    pairs = ("--train-file", place / "triples.txt", "--recipe", "simcse")
    code, _, stderr = sparsified(place, model, "out", *pairs)  # 16 letters of both are the same
    assert code == 2 and "no parameter changes alignment" in stderr and not (place / "out").exists()
    code, _, stderr = sparsified(place, model, "out", *pairs, "--max-length", 64)
    assert code == 0, stderr
