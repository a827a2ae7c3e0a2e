# ruff: noqa: F811 (the fixture is an argument)
"""Text reading, layer cutting, evaluation measures, the losses behind the recipes: the parts of pycse.training."""

from collections import Counter

import pytest
from tiny_models import needs_extras, tiny_model  # noqa: F401 (a fixture)

from pycse.training.checks import check_columns
from pycse.training.data import read_train_file
from pycse.training.encoder import parse_layers
from pycse.training.errors import UserError
from pycse.training.eval_sets import read_eval_file
from pycse.training.folder import output_folder
from pycse.training.names import resolve_model
from pycse.training.recipes import RECIPES
from pycse.training.settings import Settings
from pycse.training.wikipedia import article_sentences, split_sentences, tidy

torch = pytest.importorskip("torch")


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


# ---- text


@pytest.mark.parametrize(
    "content, rows, dropped",
    [
        ("one\ntwo\n", [("one",), ("two",)], {}),
        ("one\r\n\r\n  \ntwo", [("one",), ("two",)], {"blank lines": 2}),
        ("\ufeffone\none\n one \n", [("one",)], {"duplicates": 2}),
        ("a\tb\nc\td\n", [("a", "b"), ("c", "d")], {}),
        ("a\tb\na\t\n\tb\na\tb", [("a", "b")], {"lines with an empty column": 2, "duplicates": 1}),
        ("a\tb\tc\n", [("a", "b", "c")], {}),
        ("page\x0cbreak\nline\u2028separator\n", [("page\x0cbreak",), ("line\u2028separator",)], {}),
    ],
)
def test_train_file(tmp_path, content, rows, dropped):
    text = read_train_file(write(tmp_path / "text.txt", content))
    assert text.rows == rows
    assert text.dropped == Counter(dropped)
    assert text.columns == ("sentence", "positive", "negative")[: len(rows[0])]


@pytest.mark.parametrize(
    "content, words",
    [
        ("a\tb\n\nc\n", ["line 3", "columns is 1", "line 1 has 2"]),
        ("\n \n", ["no usable line"]),
        ("", ["is empty"]),
    ],
)
def test_train_file_errors(tmp_path, content, words):
    with pytest.raises(UserError) as caught:
        read_train_file(write(tmp_path / "text.txt", content))
    assert all(word in str(caught.value) for word in words)


def test_next_sentences_as_positives(tmp_path):
    text = read_train_file(write(tmp_path / "text.txt", "one\n\ntwo\nthree\n"))
    pairs = text.with_next()
    assert pairs.rows == [("one", "two"), ("two", "three")] and pairs.dropped == text.dropped
    with pytest.raises(UserError, match="already has pairs"):
        pairs.with_next()
    with pytest.raises(UserError, match="at least 2 sentences"):
        read_train_file(write(tmp_path / "text.txt", "one\n")).with_next()


def test_train_file_of_other_kinds(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_train_file(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="is a folder"):
        read_train_file(tmp_path)
    with pytest.raises(UserError, match="not UTF-8"):
        read_train_file(write(tmp_path / "latin.txt", "caf\xe9 au lait", "latin-1"))


@pytest.mark.parametrize(
    "paragraph, sentences",
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. J. R. Jones met the U.S. Senate. He left.", ["Dr. J. R. Jones met the U.S. Senate.", "He left."]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("It is 3.5 m long. 12 were made.", ["It is 3.5 m long.", "12 were made."]),
        ("It grew, e.g. In Rome, by half.", ["It grew, e.g. In Rome, by half."]),
    ],
)  # fmt: skip
def test_split_sentences(paragraph, sentences):
    assert list(split_sentences(paragraph)) == sentences


def test_tidy_closes_the_holes_that_templates_leave():
    assert tidy("'''Albedo''' (, ) is the ''reflecting'' power (; born 1950) , it seems .") == (
        "Albedo is the reflecting power (born 1950), it seems."
    )


def test_article_sentences_counts_what_it_drops():
    article = "\n".join(
        [
            "== Heading ==",
            "* a list item that is long enough to be kept",
            " indented",
            "",
            "The first sentence is kept here. Too short. This one has | markup left in it.",
            "a line that starts in the middle of something else.",
            "Long " + "word " * 70 + "end.",
        ]
    )
    dropped = Counter()
    assert list(article_sentences(article, dropped)) == ["The first sentence is kept here."]
    assert dropped == {
        "headings, list items, table cells": 3,
        "shorter than 5 words": 1,
        "markup left in the sentence": 1,
        "not a whole sentence": 1,
        "longer than 64 words": 1,
    }


@needs_extras
def test_default_text_is_clean_and_counted():
    from pycse.training.data import default_text

    text = default_text()
    sentences = [sentence for (sentence,) in text.rows]
    assert len(sentences) == len(set(sentences)) > 15_000
    assert not [
        s for s in sentences if "[[" in s or "{{" in s or "''" in s or "()" in s or not 5 <= len(s.split()) <= 64
    ]
    assert text.dropped["redirect pages"] == 99
    assert min(text.dropped.values()) > 0


# ---- settings


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"temperature": 0.0}, "--temperature is 0"),
        ({"temperature": -1.0}, "--temperature is -1"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"lr": 0.0}, "--lr is 0"),
        ({"m": float("inf")}, "--m is inf"),
        ({"hard_negative_weight": float("nan")}, "--hard-negative-weight is nan"),
        ({"recipe": "magic"}, "--recipe magic: unknown; use one of distillcse, focal, simcse"),
        ({"recipe": "simcse", "m": 0.3}, "--m does not belong to --recipe simcse"),
        ({"recipe": "focal", "shuffle": "none"}, "--shuffle does not belong to --recipe focal"),
        ({"recipe": "simcse", "group_p": 0.1}, "--group-p does not belong to --recipe simcse"),
        ({"recipe": "simcse", "teachers": ("a",)}, "--recipe simcse takes no --teacher"),
        ({"recipe": "focal", "cache_teachers": "a"}, "--recipe focal takes no --cache-teachers"),
        ({"teachers": ("a", "b", "a")}, "--teacher a is given 2 times"),
        ({"model": "a"}, "would be its own teacher"),
        ({"shuffle": "deal"}, "--shuffle deal: unknown; use one of sample, expected, none"),
        ({"divergence": "l2"}, "--divergence l2: unknown"),
        ({"student_temperature": 0.0}, "--student-temperature is 0"),
        ({"distill_weight": float("inf")}, "--distill-weight is inf"),
        ({"steps": 3, "epochs": 1.0}, "exclude each other"),
        ({"steps": 0}, "--steps is 0"),
        ({"epochs": 0.0}, "--epochs is 0"),
        ({"batch_size": 1}, "--batch-size is 1"),
        ({"max_length": 2}, "--max-length is 2"),
        ({"eval_steps": 0}, "--eval-steps is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"warmup": 1.0}, "--warmup is 1"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1"),
        ({"positives": "near"}, "--positives near: unknown; use one of dropout, next"),
        ({"device": "tpu"}, "--device tpu: unknown"),
    ],
)
def test_bad_settings(settings, word):
    Settings().check()
    with pytest.raises(UserError) as caught:
        Settings(**settings).check()
    assert word in str(caught.value)


def test_columns_and_loss_options_go_together():
    check_columns(Settings(symmetric=True), 2)
    check_columns(Settings(hard_negative_weight=1.0), 3)
    with pytest.raises(UserError, match="--symmetric needs"):
        check_columns(Settings(symmetric=True), 3)
    with pytest.raises(UserError, match="third column"):
        check_columns(Settings(hard_negative_weight=1.0), 2)


def test_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = output_folder(None, "focal")
    assert first.parent.name == "runs" and first.name.startswith("focal-") and not first.exists()
    first.mkdir(parents=True)
    assert not output_folder(None, "focal").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert output_folder(str(empty), "focal") == empty
    write(empty / "something", "x")
    with pytest.raises(UserError, match="has content"):
        output_folder(str(empty), "focal")
    with pytest.raises(UserError, match="is a file"):
        output_folder(str(empty / "something"), "focal")
    with pytest.raises(UserError, match="cannot write"):
        output_folder(str(empty / "something" / "below"), "focal")


# ---- encoder


@pytest.mark.parametrize(
    "text, layers", [("0,2,4", [0, 2, 4]), ("3", [3]), (" 0, 1", [0, 1]), ("all", None), (None, None)]
)
def test_parse_layers(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "0,,2", "1.5", "2,0", "0,0", "-1,2"])
def test_parse_layers_errors(text):
    with pytest.raises(UserError, match="--layers"):
        parse_layers(text)


def test_resolve_model(tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    with pytest.raises(UserError, match="is no model"):
        resolve_model(str(run))
    write(run / "model" / "modules.json", "[]")
    assert resolve_model(str(run / "model")) == (str(run / "model"), True)
    with pytest.raises(UserError, match="did you mean .*model"):
        resolve_model(str(run))
    with pytest.raises(UserError, match="is a file"):
        resolve_model(str(run / "model" / "modules.json"))
    for absent in ("./absent", str(tmp_path / "absent"), "~/absent-encoder", "a/b/c"):
        with pytest.raises(UserError, match="no such model folder"):
            resolve_model(absent)


@needs_extras
def test_keep_layers_gives_the_layers_asked_for(tiny_model):
    from pycse.training.encoder import keep_layers, load_encoder

    whole, cut = load_encoder(tiny_model, "cpu"), load_encoder(tiny_model, "cpu")
    assert keep_layers(whole, None) == keep_layers(cut, [1, 3]) == 4
    backbone = cut[0].auto_model
    assert backbone.config.num_hidden_layers == len(backbone.encoder.layer) == 2
    for new, old in ((0, 1), (1, 3)):
        for ours, theirs in zip(
            backbone.encoder.layer[new].parameters(), whole[0].auto_model.encoder.layer[old].parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match="layers 0 to 3"):
        keep_layers(whole, [0, 4])


@needs_extras
def test_one_column_needs_dropout(tiny_model):
    from pycse.training.encoder import check_for_training, load_encoder

    encoder = load_encoder(tiny_model, "cpu")
    check_for_training(encoder, by_dropout=True, max_length=32)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    check_for_training(encoder, by_dropout=False, max_length=32)
    with pytest.raises(UserError, match="no dropout"):
        check_for_training(encoder, by_dropout=True, max_length=32)
    with pytest.raises(UserError, match="at most 64 tokens"):
        check_for_training(encoder, by_dropout=False, max_length=65)


# ---- evaluation


@pytest.mark.parametrize("header", ["", "score\tsentence1\tsentence2\n"])
def test_eval_file(tmp_path, header):
    pairs = read_eval_file(write(tmp_path / "set.tsv", header + "4.5\ta\tb\n\n0\tc\td\n"))
    assert (pairs.name, pairs.first, pairs.second) == ("set", ["a", "c"], ["b", "d"])
    assert (pairs.scores, pairs.top) == ([4.5, 0.0], 4.5)


@pytest.mark.parametrize(
    "content, word",
    [
        ("1\ta\tb\nx\tc\td\n", "line 2: the score 'x'"),
        ("4,x\ta\tb\n1\tc\td\n", "line 1: the score '4,x'"),
        ("1\ta\tb\nnan\tc\td\n", "line 2: the score 'nan'"),
        ("1\ta\tb\n2\tc\n", "line 2: give score, sentence1 and sentence2"),
        ("1\ta\tb\n2\tc\td\te\n", "line 2: give score, sentence1 and sentence2"),
        ("1\ta\tb\n1\tc\td\n", "no two different scores"),
        ("score\tsentence1\tsentence2\n", "no two different scores"),
        ("", "is empty"),
    ],
)
def test_eval_file_errors(tmp_path, content, word):
    with pytest.raises(UserError) as caught:
        read_eval_file(write(tmp_path / "set.tsv", content))
    assert word in str(caught.value)


@needs_extras
def test_lee_pairs():
    from pycse.training.eval_sets import lee_pairs

    pairs = lee_pairs()
    assert len(pairs.first) == len(pairs.second) == len(pairs.scores) == 1225
    assert len(set(pairs.first + pairs.second)) == 50
    assert min(pairs.scores) == pytest.approx(0.2) and sum(score > 0.8 for score in pairs.scores) == 16


def test_names_of_evaluation_sets_differ(tmp_path, monkeypatch):
    from pycse.training import eval_sets as evaluate

    monkeypatch.setattr(evaluate, "lee_pairs", lambda: evaluate.ScoredPairs("lee", ["a"], ["b"], [1.0], 1.0))
    paths = []
    for folder, name in (("a", "x"), ("b", "x"), ("c", "lee")):
        (tmp_path / folder).mkdir()
        paths.append(str(write(tmp_path / folder / f"{name}.tsv", "1\ta\tb\n2\tc\td\n")))
    assert [pairs.name for pairs in evaluate.evaluation_sets(tuple(paths))] == ["lee", "x", "x-2", "lee-2"]


@needs_extras
def test_evaluate_against_plain_code(tiny_model):
    from scipy.stats import spearmanr

    from pycse.training.encoder import load_encoder
    from pycse.training.eval_sets import ScoredPairs
    from pycse.training.evaluate import evaluate

    encoder = load_encoder(tiny_model, "cpu")
    first, second = ["a red cat", "two dogs", "a red cat", "the sea"], ["a cat", "the dogs", "one ship", "a red cat"]
    scores = [5.0, 4.5, 1.0, 0.0]
    found = evaluate(encoder, [ScoredPairs("s", first, second, scores, top=5.0)])["s"]
    z1, z2 = (
        torch.nn.functional.normalize(torch.from_numpy(encoder.encode(texts)).double()) for texts in (first, second)
    )
    assert found["spearman"] == pytest.approx(spearmanr((z1 * z2).sum(1), scores)[0])
    assert found["alignment"] == pytest.approx((z1 - z2)[:2].square().sum(1).mean().item(), rel=1e-4)
    assert found["uniformity"] < 0
    without = evaluate(encoder, [ScoredPairs("s", first, second, scores, top=10.0)])["s"]
    assert "alignment" not in without  # no pair is similar on a scale up to 10


# ---- recipes


def logits(settings, z1, z2):
    s = torch.nn.functional.normalize(z1) @ torch.nn.functional.normalize(z2).T
    if settings.recipe == "simcse":
        return s / settings.temperature
    m = 0.3 if settings.m is None else settings.m
    i = torch.arange(len(s))
    return torch.where(i[:, None] == torch.arange(s.shape[1]), s * s, s * (s + m)) / settings.temperature


@pytest.mark.parametrize(
    "settings",
    [
        Settings(recipe="focal"),
        Settings(recipe="focal", m=0.1, temperature=0.2),
        Settings(recipe="simcse"),
        Settings(recipe="simcse", temperature=0.5, symmetric=True),
        Settings(recipe="simcse", hard_negative_weight=0.7),
    ],
    ids=lambda settings: (
        f"{settings.recipe}-{settings.temperature}-{settings.symmetric}-{settings.hard_negative_weight}"
    ),
)
def test_recipes_compute_their_loss(settings):
    pytest.importorskip("sentence_transformers")
    from pycse.training.loss import build_loss

    generator = torch.Generator().manual_seed(3)
    b, keys = 4, 8 if settings.hard_negative_weight else 4
    z1, z2 = torch.randn(b, 6, generator=generator), torch.randn(keys, 6, generator=generator)
    expected, i = logits(settings, z1, z2), torch.arange(b)
    if settings.hard_negative_weight:
        expected[i, b + i] += settings.hard_negative_weight
    loss = torch.nn.functional.cross_entropy(expected, i)
    if settings.symmetric:
        loss = (loss + torch.nn.functional.cross_entropy(expected.T, i)) / 2
    actual = build_loss(settings, torch.nn.Identity()).compute_loss_from_embeddings([z1, *z2.split(b)])
    assert actual.item() == pytest.approx(loss.item(), rel=1e-4)


def test_every_recipe_has_a_loss():
    import pycse.losses
    import pycse.sentence_transformers

    for recipe in RECIPES.values():
        assert hasattr(pycse.losses, recipe.loss) and hasattr(pycse.sentence_transformers, recipe.loss)


def test_a_backend_that_does_not_exist_is_the_users_error():
    from pycse.training.loss import check_loss

    with pytest.raises(UserError, match="backend"):
        check_loss(Settings(backend="abacus"), "cpu")
