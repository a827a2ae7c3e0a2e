# ruff: noqa: F811 (the fixture is an argument)
"""Text in: formats, columns, pipes; what would train on labels or numbers is refused. Prompts, and names of evaluation
sets, as far as the trainer."""

import gzip
import json
import os
import threading
from collections import Counter

import pytest
from test_cli import PAIRS, SENTENCES, pycse
from tiny_models import needs_extras, tiny_model  # noqa: F401 (a fixture)

from pycse.training.data import Text, read_train_file
from pycse.training.errors import UserError
from pycse.training.eval_sets import evaluation_sets, read_eval_file
from pycse.training.evaluate import by_set, metric
from pycse.training.settings import Settings

pytest.importorskip("pyarrow")

WORDS = ["red", "old", "big", "wet", "new", "odd", "far", "low", "dry", "hot", "sad", "icy"]


def rows_of(form):
    return "".join(form.format(i=i, a=f"the {word} cat", b=f"a {word} dog") for i, word in enumerate(WORDS))


def frame(path, columns, index=False):
    """A Parquet or CSV file as pandas writes it."""
    import pandas

    made = pandas.DataFrame(columns)
    made.to_parquet(path) if path.suffix == ".parquet" else made.to_csv(path, index=index)


@pytest.mark.parametrize(
    "name, content, options, rows, dropped",
    [
        ("t.csv", 'anchor,positive\n"a, b","c ""d"""\n"e\nf",g\n', {}, [("a, b", 'c "d"'), ("e\nf", "g")], {"header": 1}),
        ("t.tsv", '"a\tb"\nc,d\te\n', {}, [('"a', 'b"'), ("c,d", "e")], {}),
        ("t.txt", '"a, b"\nc\n', {}, [('"a, b"',), ("c",)], {}),
        ("t.jsonl", '{"query": "a", "pos": "b", "neg": "c", "id": 4}\n\n{"id": 5, "pos": "e", "query": "d", "neg": null}\n',
         {}, [("a", "b", "c")], {"blank lines": 1, "lines with an empty column": 1}),
        ("t.jsonl", '["a", "b", "c", "d"]\n', {}, [("a", "b", "c", "d")], {}),
        ("t.jsonl", '"a"\n"b\\tc"\n', {}, [("a",), ("b\tc",)], {}),
        ("t.jsonl.gz", gzip.compress(b'{"text": "a"}\n'), {}, [("a",)], {}),
        ("t.tsv", "sent0\tsent1\thard_neg\na\tb\tc\n", {}, [("a", "b", "c")], {"header": 1}),
        ("t.tsv", "id\tquestion1\tquestion2\n7\ta\tb\n", {}, [("a", "b")], {"header": 1}),
        ("t.tsv", "id\tquestion1\tquestion2\tis_duplicate\n7\ta\tb\t1\n", {"columns": "question2,question1"}, [("b", "a")],
         {"header": 1}),
        ("t.tsv", "1\ta b\tc\n2\td\te\n", {"columns": "2,3"}, [("a b", "c"), ("d", "e")], {}),
        ("t.tsv", "Frage\tAntwort\na\tb\n", {"columns": "antwort,Frage"}, [("b", "a")], {"header": 1}),
        ("t.tsv", "Frage\tAntwort\na\tb\n", {"columns": "1,2", "header": True}, [("a", "b")], {"header": 1}),
        ("t.tsv", "query\tanswer\na\tb\n", {"header": False}, [("query", "answer"), ("a", "b")], {}),
        ("t.tsv", "3\n4\n5\n", {"columns": "1"}, [("3",), ("4",), ("5",)], {}),
        ("t.data", "a,b\n", {"format": "csv"}, [("a", "b")], {}),
    ],
)  # fmt: skip
def test_formats_and_columns(tmp_path, name, content, options, rows, dropped):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = read_train_file(path, **options)
    assert (text.rows, text.dropped) == (rows, Counter(dropped))
    text.save(tmp_path / "kept.parquet")
    assert Text.load(tmp_path / "kept.parquet") == text


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_what_pandas_writes(tmp_path, suffix):
    path = tmp_path / f"pairs.{suffix}"
    frame(path, {"sentence1": ["a", "c"], "sentence2": ["b, d", "e"], "split": ["x", "y"]}, index=True)
    text = read_train_file(path)
    assert text.rows == [("a", "b, d"), ("c", "e")] and text.taken == ("sentence1", "sentence2")
    assert text.left_out == (("split",) if suffix == "parquet" else ("column 1", "split"))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("t.tsv", rows_of("{a}\t{b}\tneutral\n"), ["column 3 (neutral) holds one value", "--columns 1,2 "]),
        ("t.tsv", rows_of("{a}\t{b}\tyes\n{a} it\t{b}\tno\n"), ["column 3 (yes, no) holds 2 labels", "--columns 1,2 "]),
        ("t.tsv", rows_of("{i}\t{a}\t{b}\n"), ["column 1 (0, 1, 2) holds numbers", "--columns 2,3;", "--header"]),
        ("t.tsv", rows_of("{a}\t{b}\t0.{i}\n"), ["column 3 (0.0, 0.1, 0.2) holds numbers", "--columns 1,2;"]),
        ("t.tsv", "Wort\tWert\n" + rows_of("{a}\t{i}\n"), ["column 2 (Wert, 0, 1) holds numbers", "--header"]),
        ("t.csv", "text,label\n" + rows_of("{a},{i}\n"), ["label (0, 1, 2) says which rows", "--columns text"]),
        ("t.csv", "premise,hypothesis,gold_label\na,b,neutral\n", ["gold_label (neutral)", "--columns premise,hypothesis"]),
        ("t.tsv", "3.5\n4\n", ["column 1 (3.5, 4) holds numbers"]),
        ("t.jsonl", '{"q": "a", "a": "b"}\n', ["columns q (a), a (b)", "--columns q,a"]),
        ("t.jsonl", '{"text": "a", "summary": "b"}\n', ["columns text (a), summary (b)", "--columns text,summary"]),
        ("t.jsonl", '{"query": "a", "pos": ["b"]}\n', ["pos holds lists or objects"]),
        ("t.jsonl", '{"query": "a"\n', ["line 1 is not JSON"]),
        ("t.jsonl", '["a"]\n{"text": "b"}\n', ["line 2 is an object, but the first is an array"]),
        ("t.jsonl", "4\n", ["line 1: give an object"]),
        ("t.jsonl", '{"text": "\\ud800"}\n', ["line 1 holds a lone surrogate"]),
        ("t.jsonl", "{}\n", ["no usable line"]),
        ("t.csv", 'a,b\n"c,d\ne,f\n', ["line 2", "double the quotes"]),
        ("t.csv", "a,b\nc,d,e\n", ["line 2: number of columns is 3, but line 1 has 2", "--format txt"]),
        ("t.csv", "a\tb\n", ["line 1 has tabs", "--format tsv"]),
        ("t.tsv", "anchor\tpositive\n", ["a header and nothing below"]),
        ("t.parquet", "a\tb\n", ["no Parquet file"]),
        ("t.txt.gz", "a\tb\n", ["cannot read", "gzip"]),
    ],
)  # fmt: skip
def test_what_is_no_text_to_train_on(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read_train_file(tmp_path / name)
    assert name in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "columns, words",
    [
        ("1,4", "no column '4'"),
        ("2,2", "2 is there more than once"),
        ("q,a", "no column 'q' in"),
        ("", "no column ''"),
        ("0", "no column '0'"),
        ("²", "no column '²'"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, words):
    (tmp_path / "t.tsv").write_text("a\tb\tc\n")
    with pytest.raises(UserError, match="--columns") as caught:
        read_train_file(tmp_path / "t.tsv", columns=columns)
    assert words in str(caught.value)


def test_a_pipe_is_read_once(tmp_path):
    read, write = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(write, b"a\tb\nc\td\n"), os.close(write)))
    writer.start()
    text = read_train_file(f"/dev/fd/{read}")  # what a shell makes of <(...)
    writer.join()
    os.close(read)
    assert text.rows == [("a", "b"), ("c", "d")]
    text.save(tmp_path / "text")
    kept = Text.load(tmp_path / "text")
    assert kept == text and kept.fingerprint() == text.fingerprint()
    others = [[("a", "b")], [("c", "d"), ("a", "b")], [("ab", ""), ("c", "d")], [("a",), ("b",), ("c",), ("d",)]]
    assert len({Text("", rows, Counter()).fingerprint() for rows in [text.rows, *others]}) == 5
    (tmp_path / "other").write_bytes(b"PAR1")
    for path in ("other", "absent"):
        with pytest.raises(UserError, match="is no text of a run"):
            Text.load(tmp_path / path)
    os.mkfifo(tmp_path / "fifo")
    threading.Thread(target=lambda: open(tmp_path / "fifo", "wb").close()).start()
    with pytest.raises(UserError, match="is empty"):
        read_train_file(tmp_path / "fifo")


def test_texts_are_counted(tmp_path):
    text = Text("", [("a", "b", "c", "d"), ("a", "e", "f", "e"), ("g", "g", "h", "b")], Counter())
    assert text.columns == ("sentence", "positive", "negative", "negative_2")
    assert text.unit == "pairs with 2 hard negatives" and text.repeated == 2  # a and b


# ---- evaluation files


STSB = "main-captions\tMSRvid\t2012test\t{i}\t{score}\ta {word} cat\tthe {word} dog\n"


@pytest.mark.parametrize(
    "name, content, scores, skipped",
    [
        ("s.csv", "".join(STSB.format(i=i, word=w, score=i) for i, w in enumerate(WORDS[:5])), [0, 1, 2, 3, 4], 0),
        ("s.csv", "g\tf\ty\t1\t\tno\tscore\n" + STSB.format(i=1, word="b", score=1) + STSB.format(i=2, word="c", score=2),
         [1, 2], 1),
        ("s.tsv", "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n1\ta\tb\t3.3\tNEUTRAL\n2\tc\td\t1\tNEUTRAL\n",
         [3.3, 1], 0),
        ("s.tsv", "1\ta\tb\t3.3\tNEUTRAL\n2\tc\td\t1\tENTAILMENT\n", [3.3, 1], 0),
        ("s.csv", 'sentence1,sentence2,score\n"a, b",c,1\nd,e,2\n', [1, 2], 0),
        ("s.jsonl", '{"score": 1, "sentence1": "a", "sentence2": "b"}\n{"score": 2.5, "sentence1": "c", "sentence2": "d"}\n',
         [1, 2.5], 0),
        ("s.tsv", "Wert\tText\tText\n\ta\tb\n1\ta\tb\n \tc\td\n2\tc\td\n", [1, 2], 2),
    ],
)  # fmt: skip
def test_files_of_scored_pairs(tmp_path, name, content, scores, skipped):
    (tmp_path / name).write_text(content)
    pairs = read_eval_file(tmp_path / name)
    assert (pairs.scores, pairs.skipped) == (scores, skipped)
    assert all(len(text.split()) < 4 and not text[0].isdigit() for text in pairs.first + pairs.second)


@pytest.mark.parametrize(
    "content, words",
    [
        ("-\ta\tb\n1\tc\td\n2\te\tf\n", "line 1: the score '-' is no number"),
        ("nan\ta\tb\n1\tc\td\n2\te\tf\n", "line 1: the score 'nan' is no number"),
        ("N/A\ta\tb\n1\tc\td\n2\te\tf\n", "line 1: the score 'N/A' is no number"),
        ("1\ta\tb\n2\t\td\n", "line 2: a sentence is empty"),
        ("\ta\tb\n\tc\td\n", "no two different scores in its 0 pairs"),
        ("1\ta\ta\n2\tc\tc\n", "both texts of every pair are the same"),
        ("a\tb\tc\td\n", "line 1: give score"),
    ],
)
def test_scores_that_rank_nothing(tmp_path, content, words):
    (tmp_path / "s.tsv").write_text(content)
    with pytest.raises(UserError, match="s.tsv") as caught:
        read_eval_file(tmp_path / "s.tsv")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["eval", "eval_", "eval_eval", "set:eval", "loss", "runtime"])
def test_no_name_of_a_set_is_the_trainers(name):
    # What the trainer does with an evaluator's keys.
    flat = {metric(name, "spearman"): 0.5}
    flat = {key if key.startswith("eval_") else f"eval_{key}": value for key, value in flat.items()}
    assert by_set(flat | {"eval_loss": 1.0, "eval_runtime": 2.0}, [name], "eval_") == {name: {"spearman": 0.5}}


def test_sets_without_lee(tmp_path):
    (tmp_path / "s.tsv").write_text("1\ta\tb\n2\tc\td\n")
    assert [one.name for one in evaluation_sets([str(tmp_path / "s.tsv")], lee=False)] == ["s"]
    with pytest.raises(UserError, match="--no-lee leaves nothing"):
        evaluation_sets([], lee=False)


@needs_extras
@pytest.mark.parametrize("value, words", [(0.0, "equally similar"), (float("nan"), "not finite numbers")])
def test_an_encoder_that_ranks_nothing_is_said_in_words(tiny_model, value, words):
    import torch

    from pycse.training.encoder import load_encoder
    from pycse.training.eval_sets import ScoredPairs
    from pycse.training.evaluate import check_ranking, evaluate
    from pycse.training.report import verdict

    encoder = load_encoder(tiny_model, "cpu")
    pairs = ScoredPairs("s", ["a", "b", "c"], ["d", "e", "c"], [1.0, 2.0, 0.0], top=2.0)
    fine = evaluate(encoder, [pairs])
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(value)
        encoder[0].auto_model.encoder.layer[-1].output.LayerNorm.bias.fill_(1 + value)
    found = evaluate(encoder, [pairs])
    with pytest.raises(UserError, match=words):
        check_ranking("m", found)
    assert words in verdict(fine, found)[1] and not verdict(fine, found)[0]
    assert verdict(found, fine) == (True, f"The run made the model better on s (none -> {fine['s']['spearman']:.4f}).")


@needs_extras
def test_equal_texts_rank_alike(tiny_model):
    from scipy.stats import spearmanr

    from pycse.training.encoder import load_encoder
    from pycse.training.eval_sets import ScoredPairs
    from pycse.training.evaluate import evaluate

    texts, gold = SENTENCES[:9], [3.0, 1.0, 4.0, 1.5, 5.0, 0.0, 2.0, 6.0, 2.5]
    pairs = ScoredPairs("s", texts + ["the sea"], [*texts, "a cat"], [*gold, 7.0], top=7.0)
    found = evaluate(load_encoder(tiny_model, "cpu"), [pairs])["s"]["spearman"]
    assert found == pytest.approx(spearmanr([1.0] * 9 + [0.0], [*gold, 7.0])[0])


# ---- runs


BAD_SETTINGS = [
    ({"format": "xml", "train_file": "t"}, "--format xml: unknown"),
    ({"columns": "1"}, "--columns says how to read --train-file"),
    ({"header": True, "no_header": True, "train_file": "t"}, "exclude each other"),
    ({"prompt": "a", "query_prompt": "b"}, "--prompt is for all texts and excludes --query-prompt"),
    ({"static": 8, "document_prompt": "b"}, "--document-prompt does not go with --static"),
    ({"eval_batch_size": 0}, "--eval-batch-size is 0"),
]


@pytest.mark.parametrize("settings, words", BAD_SETTINGS)
def test_settings_of_the_text(settings, words):
    with pytest.raises(UserError) as caught:
        Settings(**settings).check()
    assert words in str(caught.value)


def test_a_pipe_and_several_processes(monkeypatch):
    from pycse.training import prepare

    monkeypatch.setattr(prepare.ranks, "size", lambda: 2)
    read, write = os.pipe()
    try:
        with pytest.raises(UserError, match="is a pipe, which one process can read, not 2"):
            prepare.read_text(Settings(train_file=f"/dev/fd/{read}"))
    finally:
        os.close(read), os.close(write)


@pytest.mark.parametrize("positives", ["next", "switch-case", None])
def test_what_was_kept_of_a_pipe_has_its_positives(tmp_path, positives):
    from pycse.training.folder import TEXT
    from pycse.training.prepare import read_text

    (tmp_path / "text.txt").write_text("one two\nthree four\nfive six\n")
    begun = Settings(train_file=str(tmp_path / "text.txt"), positives=positives)
    text = read_text(begun)
    text.save(tmp_path / TEXT)
    assert read_text(Settings(train_file="/dev/fd/99", positives=positives, resume=str(tmp_path))) == text
    assert len(text.columns) == (2 if positives else 1)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with pairs that share anchors and have two hard negatives, and evaluation files of awkward names."""
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "140")
    lines = [f'{s},"{s}, now",no {s[::-1]},not {s}' for s in SENTENCES] + [
        f"{SENTENCES[0]},so,no {k},not {k}" for k in "ab"
    ]
    (tmp_path / "four.csv").write_text("anchor,positive,negative_1,negative_2\n" + "\n".join(lines) + "\n")
    (tmp_path / "pairs.tsv").write_text("".join(f"{s}\t{s} now\n" for s in SENTENCES))
    for name in ("eval.tsv", "eval_x.tsv"):
        (tmp_path / name).write_text(PAIRS + "\ta\tb\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMON = ("--device", "cpu", "--batch-size", 4, "--eval-file", "eval.tsv", "--eval-file", "eval_x.tsv", "--no-lee")  # fmt: skip


@needs_extras
def test_a_run_on_columns_with_prompts(place, tiny_model, monkeypatch):
    from datasets import config
    from sentence_transformers import SentenceTransformer

    from pycse.training.encoder import load_encoder
    from pycse.training.evaluate import evaluate

    home = place / "home"
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", home)
    code, stdout, stderr = pycse(
        "train", "--model", tiny_model, "--train-file", "four.csv", "--out", "out", "--recipe", "focal", "--steps", 3,
        "--hard-negative-weight", 1, "--query-prompt", "query: ", "--document-prompt", "text: ", "--eval-batch-size", 2,
        *COMMON,
    )  # fmt: skip
    assert code == 0, stderr
    assert "pairs with 2 hard negatives" in stdout and "negative 2: negative_2" in stdout
    assert "texts in several rows" in stdout and "evaluation set eval_x: pairs without a score" in stdout
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    assert metrics["text"]["columns"] == ["sentence", "positive", "negative", "negative_2"]
    assert metrics["text"]["repeated"] == 2  # the first sentence, and "so"
    assert metrics["after"].keys() == {"eval", "eval_x"} and metrics["after"]["eval"] == metrics["after"]["eval_x"]
    encoder = load_encoder(str(place / "out" / "model"), "cpu")
    (pairs,) = evaluation_sets(["eval.tsv"], lee=False)
    again = evaluate(encoder, [pairs], prompts=("query: ", "text: "))["eval"]
    assert again == pytest.approx(metrics["after"]["eval"], rel=1e-4)
    assert again != pytest.approx(evaluate(encoder, [pairs])["eval"], rel=1e-4)
    assert SentenceTransformer(str(place / "out" / "model"), device="cpu").prompts["query"] == "query: "
    assert not home.exists()
    code, stdout, stderr = pycse(
        "eval", "out/model", tiny_model, "--eval-file", "eval.tsv", "--no-lee", "--query-prompt", "query: ",
        "--document-prompt", "text: ", "--device", "cpu", "--json", "s.json",
    )  # fmt: skip
    assert code == 0, stderr
    scores = json.loads((place / "s.json").read_text())
    assert [one["model"] for one in scores] == ["out/model", tiny_model]
    assert scores[0]["scores"]["eval"] == pytest.approx(metrics["after"]["eval"], rel=1e-4)
    assert scores[1]["scores"]["eval"] == pytest.approx(metrics["before"]["eval"], rel=1e-4)


@needs_extras
@pytest.mark.parametrize(
    "command",
    [
        [
            "train",
            "--recipe",
            "sparsecse",
            "--steps",
            2,
            "--finetune-steps",
            1,
            "--model",
            "MODEL",
            "--train-file",
            "pairs.tsv",
        ],
        ["train", "--static", 8, "--steps", 2, "--model", "MODEL", "--train-file", "four.csv"],
        [
            "sparsify",
            "MODEL",
            "--finetune-steps",
            1,
            "--recipe",
            "distillcse",
            "--train-file",
            "four.csv",
            "--prompt",
            "a ",
        ],
    ],
)
def test_awkward_names_in_every_kind_of_run(place, tiny_model, command):
    words = [tiny_model if word == "MODEL" else word for word in command]
    code, _, stderr = pycse(*words, "--out", "out", *COMMON)
    assert code == 0, stderr
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    assert metrics["after"].keys() == {"eval", "eval_x"} and metrics["after"]["eval"] == metrics["after"]["eval_x"]


@needs_extras
def test_equal_texts_are_no_negatives_by_default(tiny_model):
    """What the run's table says, of the losses that runs build: two rows of one anchor have no negatives."""
    import torch

    from pycse.training.encoder import load_encoder
    from pycse.training.loss import build_loss
    from pycse.training.static.loss import StaticLoss

    encoder = load_encoder(tiny_model, "cpu").eval()
    loss = build_loss(Settings(recipe="simcse", model=tiny_model), encoder)
    static = StaticLoss(Settings(static=8))
    z = torch.randn(2, 2, 8, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    for anchors, hashes, alone in ((["a cat"] * 2, [5, 5], True), (["a cat", "the sea"], [5, 6], False)):
        with torch.no_grad():
            value = loss([encoder.preprocess(anchors), encoder.preprocess(["a dog", "one dog"])])
        assert (value.item() == 0) is alone
        value = static(list(z), [torch.tensor(hashes), torch.tensor([7, 8])])
        assert (value.item() == 0) is alone


# ---- positives of sentences


def test_case_is_switched_once_by_seed():
    text = Text("t", [(sentence,) for sentence in SENTENCES], Counter())
    pairs = text.with_switched_case(1)
    assert [anchor for anchor, _ in pairs.rows] == SENTENCES and [b.lower() for _, b in pairs.rows] == SENTENCES
    changed = [len([w for w in b.split() if w[0].isupper()]) for _, b in pairs.rows]
    assert 0 < sum(changed) < len(SENTENCES) * 7 * 0.25 and all(
        b[1:] == b[1:].lower() or " " in b for _, b in pairs.rows
    )
    assert pairs.rows == text.with_switched_case(1).rows != text.with_switched_case(2).rows
    assert not pairs.by_dropout and text.by_dropout and Text("", [("a", "a"), ("b", "b")], Counter()).by_dropout
    with pytest.raises(UserError, match="--positives switch-case needs single sentences"):
        pairs.with_switched_case(1)


@needs_extras
def test_views_that_a_model_cannot_tell_apart(place, tiny_model):
    (place / "text.txt").write_text("\n".join(SENTENCES) + "\n")
    (place / "same.tsv").write_text("".join(f"{s}\t{s}\n" for s in SENTENCES))
    for arguments, words in (
        (["--positives", "switch-case", "--train-file", "text.txt"], "this model's tokenizer knows no case"),
        (
            ["--static", 8, "--positives", "switch-case", "--train-file", "text.txt"],
            "this model's tokenizer knows no case",
        ),
        (["--static", 8, "--train-file", "same.tsv"], "every positive is its anchor"),
    ):
        code, _, stderr = pycse(
            "train", "--model", tiny_model, "--recipe", "focal", "--out", "out", *arguments, *COMMON
        )
        assert code == 2 and words in stderr and stderr.count("\n") == 1 and not (place / "out").exists()


@needs_extras
def test_a_cased_tokenizer_sees_the_switch(tiny_model, monkeypatch):
    from pycse.training.encoder import check_case, load_encoder

    encoder = load_encoder(tiny_model, "cpu")
    pairs = Text("t", [(sentence,) for sentence in SENTENCES], Counter()).with_switched_case(1).rows
    with pytest.raises(UserError, match="knows no case"):
        check_case(encoder, pairs)
    from tokenizers import normalizers

    encoder.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    check_case(encoder, pairs)


def test_columns_that_judge_under_any_name(tmp_path):
    """A similarity or a class of each pair says which rows are no positives, whatever it is called."""
    for name, values in (("Quality", "01"), ("gold_score", "05"), ("is_paraphrase", ("true", "false"))):
        path = tmp_path / f"{name}.csv"
        rows = [f"text {i},other {i},{values[i % 2]}" for i in range(40)]
        path.write_text(f"sentence1,sentence2,{name}\n" + "\n".join(rows) + "\n")
        with pytest.raises(UserError, match="says which rows belong together"):
            read_train_file(path)
    path = tmp_path / "scores.tsv"
    path.write_text("".join(f"text {i}\tother {i}\t{'nan' if i == 50 else i / 100}\n" for i in range(100)))
    with pytest.raises(UserError, match="holds numbers"):
        read_train_file(path)


def test_bytes_and_semicolons(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = {"anchor": [b"one cat", "caf\u00e9".encode()], "positive": [b"a cat", b"tea"]}
    schema = pyarrow.schema([(name, pyarrow.binary()) for name in columns])
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), tmp_path / "a.parquet")
    assert read_train_file(tmp_path / "a.parquet").rows == [("one cat", "a cat"), ("caf\u00e9", "tea")]
    columns["positive"] = [b"\xff", b"tea"]
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="column 2 holds bytes that are no text"):
        read_train_file(tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("anchor;positive\nhow are you;fine\n")
    with pytest.raises(UserError, match="separated by semicolons"):
        read_train_file(tmp_path / "c.csv")


def test_the_top_of_a_scale_is_that_of_the_scores(tmp_path):
    (tmp_path / "a.csv").write_text("id,sentence1,sentence2,score\n1,a,b,0.9\n2,c,d,0.1\n3,e,f,0.95\n")
    assert read_eval_file(tmp_path / "a.csv").top == 0.95
    (tmp_path / "b.csv").write_text("label,sentence1,sentence2,similarity_score\n1,a,b,0.9\n0,c,d,0.1\n1,e,f,0.95\n")
    assert read_eval_file(tmp_path / "b.csv").scores == [0.9, 0.1, 0.95]


@needs_extras
def test_an_encoders_own_prompt_is_trained_with(tiny_model):
    from sentence_transformers import SentenceTransformer

    from pycse.training.prepare import keep_prompts, take_prompt

    encoder = SentenceTransformer(tiny_model, device="cpu", prompts={"query": "q: "}, default_prompt_name="query")
    own, other = Settings(), Settings(query_prompt="to: ")
    take_prompt(own, encoder)
    take_prompt(other, encoder)
    assert own.prompts == ("q: ", "q: ") and own.column_prompts(["a", "b"]) == {"a": "q: ", "b": "q: "}
    assert other.prompts == ("to: ", "") and other.column_prompts(["a", "b"]) == {"a": "to: "}
    keep_prompts(encoder, other)  # plain encode would put one of two prompts before every text
    assert encoder.default_prompt_name is None and encoder.prompts["query"] == "to: "
