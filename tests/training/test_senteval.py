# ruff: noqa: F811 (the fixture is an argument)
"""SentEval's folder: what is read of it, and what `pycse eval --senteval` shows."""

import json
from pathlib import Path

import pytest
from test_cli import pycse
from tiny_models import needs_extras, tiny_model, wide_model  # noqa: F401 (fixtures)

from pycse.training.errors import UserError
from pycse.training.senteval import COUNTS, PUBLISHED, SUBSETS, TASKS, differences, senteval_sets

DATA = Path(__file__).parents[3] / "shared" / "data" / "senteval"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
ANIMALS = ("cat", "dog", "hen", "cow", "ant", "bee")


def write(root, header=True, tasks=TASKS):
    """A small folder of the same layout: 6 pairs a subset, of which the third has no score."""
    for task in tasks:
        if task == "STS-B":
            folder = root / "STS" / "STSBenchmark"
            folder.mkdir(parents=True)
            row = "g\tf\ty\t0\t{}\ta {} here\tthe {}\n"
            lines = [row.format(k, one, ANIMALS[k - 1] if k < 5 else one) for k, one in enumerate(ANIMALS)]
            (folder / "sts-test.csv").write_text("".join(lines))
        elif task == "SICK-R":
            (root / "SICK").mkdir(parents=True)
            head = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n" if header else ""
            lines = [f"{k}\ta {one} here\tthe {ANIMALS[k - 1]}\t{k / 2}\tNEUTRAL\n" for k, one in enumerate(ANIMALS)]
            (root / "SICK" / "SICK_test_annotated.txt").write_text(head + "".join(lines))
        else:
            folder = root / "STS" / f"{task}-en-test"
            folder.mkdir(parents=True)
            for subset in SUBSETS[task]:
                pairs = [f'a {one} "in {subset}\tthe {ANIMALS[k - 1]}\n' for k, one in enumerate(ANIMALS)]
                scores = ["" if k == 2 else str(k) for k in range(6)]
                (folder / f"STS.input.{subset}.txt").write_text("".join(pairs))
                (folder / f"STS.gs.{subset}.txt").write_text("\n".join(scores) + "\n")
    return root


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("inside", ["", "downstream", "data/downstream"])
def test_a_small_folder(tmp_path, header, inside):
    write(tmp_path / inside, header)
    sets = {one.name: one for one in senteval_sets(tmp_path)}
    assert tuple(sets) == TASKS
    for task, subsets in SUBSETS.items():
        one = sets[task]
        assert len(one.first) == len(one.scores) == 5 * len(subsets) and one.skipped == len(subsets)
        assert one.parts == {name: (5 * k, 5 * k + 5) for k, name in enumerate(subsets)}
        assert one.first[5] == f'a cat "in {subsets[1]}'
    assert sets["SICK-R"].scores == [0, 0.5, 1, 1.5, 2, 2.5] and sets["SICK-R"].first[0] == "a cat here"
    assert sets["STS-B"].scores == [0, 1, 2, 3, 4, 5] and {one.top for one in sets.values()} == {5.0}
    assert len(differences(list(sets.values()))) == 7


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda root: (root / "STS/STS13-en-test/STS.gs.FNWN.txt").unlink(), "STS.gs.FNWN.txt"),
        (
            lambda root: (root / "STS/STS13-en-test/STS.gs.FNWN.txt").write_text("1\n"),
            "has 6 lines and STS.gs.FNWN.txt 1",
        ),
        (lambda root: (root / "STS/STS13-en-test/STS.gs.FNWN.txt").write_text("-\n" * 6), "line 1: the score '-'"),
        (
            lambda root: (root / "STS/STS13-en-test/STS.input.FNWN.txt").write_text("a\n" * 6),
            "line 1: give two sentences",
        ),
        (lambda root: (root / "STS").rename(root / "sts"), "has neither STS/ nor SICK/"),
        (lambda root: (root / "STS").parent.rename(root.parent / "away"), "no such folder"),
    ],
)
def test_a_folder_that_is_not_whole(tmp_path, spoil, words):
    root = write(tmp_path / "data", tasks=("STS13",))
    spoil(root)
    with pytest.raises(UserError) as caught:
        senteval_sets(root)
    assert words in str(caught.value)


def test_published_rows():
    """Each paper's mean is the mean of its tasks, so no digit is wrong alone."""
    for values in PUBLISHED.values():
        assert sum(values[:7]) / 7 == pytest.approx(values[7], abs=0.0051)


@needs_extras
def test_the_table_of_two_encoders(tmp_path, tiny_model, wide_model, monkeypatch):
    from scipy.stats import spearmanr
    from sentence_transformers import SentenceTransformer

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    root = write(tmp_path / "data")
    code, stdout, stderr = pycse(
        "eval", tiny_model, wide_model, "--senteval", root, "--full", "--no-lee", "--device", "cpu", "--json", "s.json"
    )
    assert code == 0, stderr
    found = json.loads((tmp_path / "s.json").read_text())
    assert all(name in stdout for name in (*TASKS, *PUBLISHED, "STS-B has 6 scored pairs, not 1379"))
    for model, one in zip((tiny_model, wide_model), found):
        encoder = SentenceTransformer(model, device="cpu")
        (pairs,) = (one for one in senteval_sets(root) if one.name == "STS14")
        similarities = encoder.similarity_pairwise(encoder.encode(pairs.first), encoder.encode(pairs.second))
        tasks, parts = one["senteval"]["tasks"], one["senteval"]["parts"]
        assert tasks["STS14"]["spearman"] == pytest.approx(spearmanr(similarities.round(decimals=6), pairs.scores)[0])
        similar, gold = similarities[10:15].round(decimals=6), pairs.scores[10:15]
        assert parts["STS14"]["headlines"] == pytest.approx(spearmanr(similar, gold)[0])
        assert one["senteval"]["mean"] == pytest.approx(sum(task["spearman"] for task in tasks.values()) / 7)
        assert tasks["STS-B"]["alignment"] > 0 > tasks["STS-B"]["uniformity"]  # the one pair above 4
        assert f"{100 * tasks['SICK-R']['spearman']:.2f}" in stdout and f"{tasks['STS-B']['alignment']:.4f}" in stdout


@needs_extras
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--full"], "--full belongs to --senteval"),
        (["--senteval", "nowhere"], "--senteval nowhere: no such folder"),
        (["MODEL"], "is given 2 times"),
        (["--no-lee"], "--no-lee leaves nothing"),
        (["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_bad_input(tmp_path, tiny_model, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = pycse("eval", tiny_model, *[tiny_model if word == "MODEL" else word for word in arguments])
    assert code == 2 and words in stderr and stderr.count("\n") == 1


@needs_data
def test_counts_of_the_real_folder():
    sets = senteval_sets(DATA)
    assert {one.name: len(one.scores) for one in sets} == COUNTS and differences(sets) == []
    assert {one.name: one.skipped for one in sets if one.skipped} == {"STS15": 5500, "STS16": 7997}


@needs_data
@needs_extras
def test_the_score_of_all_minilm():
    """All seven, by hand: 72.37, 80.60, 75.60, 85.39, 78.99, 82.03, 77.15."""
    from pycse.training.encoder import load_encoder
    from pycse.training.evaluate import evaluate
    from pycse.training.names import bundled_model

    tasks = [one for one in senteval_sets(DATA) if one.name == "STS16"]
    found = evaluate(load_encoder(bundled_model(), "cpu"), tasks)
    assert round(100 * found["STS16"]["spearman"], 2) == 78.99
