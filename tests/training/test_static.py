# ruff: noqa: F811 (the fixture is an argument)
"""Static tables: lengths, tokens by index, where a table starts, the step beside sentence-transformers' own."""

import copy
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import needs_extras, tiny_model, wide_model  # noqa: F401 (fixtures)

from pycse.training.data import Text
from pycse.training.errors import UserError
from pycse.training.settings import Settings

torch = pytest.importorskip("torch")
ROWS = [(f"{a} {b}", f"{b} {c}") for a in ("red", "old", "big") for b in ("cat", "ship") for c in ("sea", "sun")]


# ---- settings


@pytest.mark.parametrize(
    "settings, lengths",
    [
        ({"static": 1024}, (1024, 512, 256, 128, 64, 32)),
        ({"static": 100}, (100, 50)),
        ({"static": 32}, (32,)),
        ({"static": 3}, (3,)),
        ({"static": 1}, (1,)),
        ({"static": 8, "dims": "2,8,5"}, (8, 5, 2)),
    ],
)
def test_lengths(settings, lengths):
    assert Settings(**settings).lengths == lengths


def test_defaults_of_a_static_run():
    plain, static, taught = Settings(), Settings(static=8), Settings(static=8, teachers=("a",))
    assert (plain.recipe, static.recipe, taught.recipe) == ("distillcse", "simcse", "distillcse")
    assert (plain.batch_size, static.batch_size) == (64, 2048)
    assert static.learning_rate > Settings(static=8, init="a").learning_rate > plain.learning_rate
    assert Settings(static=8, train_file="a").positives_of_sentences == "next"
    assert static.as_dict()["dims"] == [8]
    assert Settings(static=8, batch_size=3, recipe="focal", lr=0.5, max_length=7).as_dict()["batch_size"] == 3
    for settings in (plain, static, taught):
        settings.check()


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"static": 0}, "--static is 0"),
        ({"dims": "8,4"}, "--dims belongs to --static"),
        ({"init": "a"}, "--init belongs to --static"),
        ({"static": 8, "dims": "8,4,4"}, "4 is there 2 times"),
        ({"static": 8, "dims": "16,8"}, "16 is no length of --static 8"),
        ({"static": 8, "dims": "8,0"}, "0 is no length of --static 8"),
        ({"static": 8, "dims": "8,-2"}, "-2 is no length"),
        ({"static": 8, "dims": "4,2"}, "features beyond 4 would not be trained"),
        ({"static": 8, "dims": "8,x"}, "give lengths"),
        ({"static": 8, "dims": ""}, "give lengths"),
        ({"static": 8, "recipe": "sparsecse"}, "removes parameters of encoders"),
        ({"static": 8, "recipe": "distillcse"}, "no encoder to learn from; give --teacher"),
        ({"static": 8, "recipe": "simcse", "teachers": ("a",)}, "--recipe simcse takes no --teacher"),
        ({"static": 8, "layers": "0,2"}, "a table has no layers"),
        ({"static": 8, "model": "a", "init": "b"}, "exclude each other"),
        ({"static": 8, "positives": "dropout"}, "a table has no dropout"),
        ({"static": 8, "sparsity": 0.5}, "--sparsity does not belong to --recipe simcse"),
    ],
)
def test_bad_settings_of_a_static_run(settings, word):
    with pytest.raises(UserError) as caught:
        Settings(**settings).check()
    assert word in str(caught.value)


# ---- tokens


def static_of(folder, width=8):
    """A Start with random rows and the tokens of a tiny model."""
    from pycse.training.static.table import start

    return start(Settings(static=width, model=folder), folder, "tiny", "cpu")


@needs_extras
def test_bags_are_those_of_the_module(tiny_model, tmp_path):
    from pycse.training.static.tokens import tokenise

    begun = static_of(tiny_model)
    text = Text("here", [("red cat", "a ship"), ("a ship", "red cat"), ("?", "the sea, 3.5 m")], {})
    tokens = tokenise(text, begun.tokenizer, 256, tmp_path)
    assert tokens.sentences == ["red cat", "a ship", "?", "the sea, 3.5 m"]
    assert tokens.index.tolist() == [[0, 1], [1, 0], [2, 3]]
    assert tokens.ids.dtype == np.int32 and isinstance(tokens.ids, np.memmap)
    asked = [3, 0, 0, 2]
    ids, offsets = tokens.bags(np.array(asked), torch.device("cpu"))
    expected = begun.model[0].preprocess([tokens.sentences[i] for i in asked])
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(offsets, expected["offsets"])
    assert len(set(tokens.hashes.tolist())) == 4

    (tmp_path / "cut").mkdir()
    cut = tokenise(text, begun.tokenizer, 2, tmp_path / "cut")
    ids, offsets = cut.bags(np.arange(4), torch.device("cpu"))
    assert offsets.tolist() == [0, 2, 4, 5]
    whole = [begun.tokenizer.encode(s, add_special_tokens=False).ids for s in cut.sentences]
    assert ids.tolist() == [token for tokens in whole for token in tokens[:2]]


@needs_extras
def test_texts_that_are_equal_once_cut_are_known(tiny_model, tmp_path):
    from pycse.training.static.tokens import tokenise

    text = Text("here", [("red cat", "red ship"), ("a sea", "red")], {})
    hashes = tokenise(text, static_of(tiny_model).tokenizer, 3, tmp_path).hashes  # a letter is a token
    assert hashes[0] == hashes[1] == hashes[3] != hashes[2]


@needs_extras
def test_batches_take_every_row_once_an_epoch_in_an_order_of_its_own():
    from pycse.training.static.tokens import batches

    drawn = batches(10, 3, seed=1)
    first, second = ([next(drawn) for _ in range(3)] for _ in range(2))
    for epoch in (first, second):
        assert all(len(batch) == 3 for batch in epoch) and len(set(np.concatenate(epoch))) == 9
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    assert np.array_equal(next(batches(10, 3, seed=1)), first[0])


@needs_extras
def test_a_teacher_reads_a_text_once(tmp_path):
    from pycse.training.static.tokens import BLOCK, KeptTeacher

    class Teacher:
        width, read = 2, []

        def __call__(self, texts):
            self.read += texts
            return torch.tensor([[len(text), 1.0] for text in texts], dtype=torch.float64)

    teacher = Teacher()
    texts = ["a" * (k + 1) for k in range(BLOCK + 3)]
    kept = KeptTeacher(teacher, [*texts, "never"], np.arange(BLOCK + 3)[::-1], tmp_path / "kept")
    assert kept(np.array([2, 0, 2])).tolist() == [[3, 1], [1, 1], [3, 1]]
    assert teacher.read == texts[:BLOCK]  # and its neighbours: a run that goes on reads them together too
    assert kept(np.array([0, BLOCK + 1, 2])).tolist() == [[1, 1], [BLOCK + 2, 1], [3, 1]]
    assert teacher.read == texts


# ---- where a table starts


def test_principal_components_against_numpy():
    from pycse.training.static.table import principal

    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 7.0))
    _, _, directions = np.linalg.svd((x - x.mean(0)).double().numpy(), full_matrices=False)
    expected = (x - x.mean(0)).double().numpy() @ directions[:4].T
    got = principal(x, 4).numpy()
    assert np.allclose(np.abs(got), np.abs(expected), atol=1e-4)
    assert (got.std(0)[:-1] > got.std(0)[1:]).all()
    assert torch.allclose(principal(x, 2), principal(x, 6)[:, :2])


@needs_extras
def test_rows_of_an_encoder_are_weighted_and_of_size_1(tiny_model):
    from pycse.training.static.table import scaled

    class Tokenizer:
        def get_vocab(self, with_added_tokens):
            return {"[PAD]": 0, "[unused1]": 1, "the": 2, "cat": 3}

    p = np.array([1 / 2, 1 / 3, 1 / 4]) / (1 / 2 + 1 / 3 + 1 / 4)
    rows = np.zeros((4, 2))
    rows[[0, 2, 3]] = (1e-4 / (1e-4 + p))[:, None]
    rows /= np.sqrt((rows[[0, 2, 3]] ** 2).mean())
    assert np.allclose(scaled(torch.ones(4, 2, dtype=torch.float64), Tokenizer()).numpy(), rows)


@needs_extras
def test_an_encoders_tokens_and_a_tables(tiny_model, tmp_path):
    from pycse.training.encoder import load_encoder
    from pycse.training.static.table import start, token_embeddings

    whole = start(Settings(static=32, init=tiny_model), tiny_model, "tiny", "cpu")
    table = whole.model[0].embedding.weight
    assert table.shape == (whole.tokenizer.get_vocab_size(), 32) and table.square().mean().item() == pytest.approx(1)
    encoder = load_encoder(tiny_model, "cpu").eval()
    cls, sep, letter = (encoder.tokenizer.convert_tokens_to_ids(name) for name in ("[CLS]", "[SEP]", "q"))
    with torch.no_grad():
        ids = torch.tensor([[sep, letter, cls]])
        last = encoder[0].auto_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.allclose(token_embeddings(encoder, len(table), "--init", "tiny")[letter], last[0].mean(0), atol=1e-5)
    assert whole.encoder.tokenizer("cat", padding="max_length")["input_ids"].count(0) > 10  # its own still pads

    whole.model.save_pretrained(str(tmp_path / "table"))
    again = start(Settings(static=20, init="table"), str(tmp_path / "table"), "table", "cpu")
    assert torch.equal(again.model[0].embedding.weight, table[:, :20]) and again.encoder is None
    assert again.words == "the table of table, the first 20 of 32 features"


@needs_extras
def test_a_source_that_does_not_fit(tiny_model, wide_model, tmp_path):
    from pycse.training.static.table import start

    with pytest.raises(UserError, match="--init tiny is 32 wide, less than --static 64"):
        start(Settings(static=64, init=tiny_model), tiny_model, "tiny", "cpu")
    static_of(tiny_model).model.save_pretrained(str(tmp_path / "table"))
    static_of(wide_model).model.save_pretrained(str(tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "tokenizer.json", tmp_path / "table" / "tokenizer.json")
    for settings, of in ((Settings(static=8, init="x"), "--init"), (Settings(static=8, model="x"), "--model")):
        with pytest.raises(UserError, match=f"{of} table: its tokenizer has .* tokens and its table .* rows"):
            start(settings, str(tmp_path / "table"), "table", "cpu")


# ---- a step


def test_means_of_rows_and_their_gradient():
    """A text without tokens, at the front, amid and at the end; a token twice in a text, and one in none."""
    from pycse.training.static.bags import mean_of_rows

    generator = torch.Generator().manual_seed(0)
    ids, offsets = torch.tensor([3, 3, 0, 5, 3]), torch.tensor([0, 0, 3, 3, 5])
    dz = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    results = []
    for mean in (mean_of_rows, lambda w, i, o: torch.nn.functional.embedding_bag(i, w, o, mode="mean")):
        table = torch.randn(6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        z = mean(table, ids, offsets)
        z.backward(dz)
        results.append((z.detach(), table.grad))
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, atol=1e-12)


@needs_extras
def test_steps_are_those_of_sentence_transformers(tiny_model, tmp_path):
    """Three steps of the same batches, optimizer and lengths; no text of a batch comes twice."""
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    from pycse.training.static.fit import optimizer_of, train_step
    from pycse.training.static.loss import StaticLoss
    from pycse.training.static.tokens import tokenise

    settings = Settings(static=32, model=tiny_model, dims="32,12,4", lr=0.01)
    ours = static_of(tiny_model, 32)
    theirs = copy.deepcopy(ours.model)
    rows = [(f"{a} cat", f"{a} ship by the sea") for a in ("red", "old", "big", "new", "wet", "dry")]
    tokens = tokenise(Text("here", rows, {}), ours.tokenizer, 256, tmp_path)
    loss = MatryoshkaLoss(theirs, MultipleNegativesRankingLoss(theirs, scale=20.0), [32, 12, 4])
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.0)
    step, own = StaticLoss(settings), optimizer_of(ours.model, settings)
    for k in range(3):
        batch = (np.arange(4) + k) % 6
        value = train_step(ours.model, tokens, batch, step, own)
        expected = loss([theirs[0].preprocess([rows[i][c] for i in batch]) for c in (0, 1)], None)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert value == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(ours.model[0].embedding.weight, theirs[0].embedding.weight, atol=1e-3)


@needs_extras
def test_the_learning_rate_rises_and_falls():
    from pycse.training.static.fit import factor

    assert [round(factor(step, 10, 0.3), 3) for step in range(10)] == [
        0.333, 0.667, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125,
    ]  # fmt: skip
    assert factor(0, 1, 0.1) == 1 and factor(0, 10, 0.0) == 1


def test_freed_memory_is_kept():
    code = (
        "import torch; from pycse.training.static.memory import keep_freed_memory\n"
        "def pages(): return int(open('/proc/self/statm').read().split()[1])\n"
        "print(keep_freed_memory()); before = pages()\n"
        "x = torch.zeros(1 << 24, dtype=torch.float32, device='cpu'); full = pages(); del x\n"
        "print(pages() - before > 0.9 * (full - before) > 0)"
    )
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        pytest.skip("glibc's allocator alone is told to keep memory")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


# ---- the command


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "140")
    # Tests of the same process that look at memory shall not see it.
    monkeypatch.setattr("pycse.training.static.run.keep_freed_memory", lambda: True)
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "pairs.txt").write_text("".join(f"{a}\t{b}\n" for a, b in dict.fromkeys(ROWS)))
    (folder / "full").mkdir()
    (folder / "full" / "keep.txt").write_text("keep")
    monkeypatch.chdir(folder)
    return folder


def pycse(*arguments):
    from typer.testing import CliRunner

    from pycse.cli import app

    result = CliRunner().invoke(app, ["train", *(str(argument) for argument in arguments)], prog_name="pycse")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def run(tiny_model, out, *more):
    return pycse(
        "--static", 16, "--dims", "16,4", "--train-file", "pairs.txt", "--out", out, "--device", "cpu",
        "--batch-size", 4, "--steps", 3, "--eval-steps", 2, *more,
    )  # fmt: skip


@needs_extras
def test_a_static_run_and_the_model_that_it_saves(place, tiny_model):
    from sentence_transformers import SentenceTransformer

    code, stdout, stderr = run(tiny_model, "out", "--model", tiny_model, "--teacher", tiny_model)
    assert code == 0, stderr
    for expected in ("Spearman at each length", "truncate_dim", "sentences a second", "dims 16,4", "distillation"):
        assert expected in stdout
    out = place / "out"
    assert {path.name for path in out.iterdir()} == {
        "model",
        "metrics.json",
        "curves.png",
        "lengths.png",
        "run.toml",
        "run.json",
    }
    metrics = json.loads((out / "metrics.json").read_text())
    static = metrics["static"]
    assert [entry["length"] for entry in static["lengths"]] == metrics["settings"]["dims"] == [16, 4]
    assert static["lengths"][0]["after"] == metrics["after"] and static["lengths"][0]["before"] == metrics["before"]
    assert static["beside"]["scores"]["lee"] and static["size"]["static"]["sentences_a_second"] > 0
    assert [entry["step"] for entry in metrics["history"]["loss"]] == [1, 2, 3]
    assert [entry["step"] for entry in metrics["history"]["scores"]] == [0, 2, 3]
    assert 0 < metrics["teachers"][0]["embedded"] <= len({a for a, _ in ROWS})

    whole = SentenceTransformer(str(out / "model"), device="cpu")
    short = SentenceTransformer(str(out / "model"), device="cpu", truncate_dim=4)
    texts = ["red cat by the sea", "?"]
    z = whole.encode(texts)
    assert z.shape == (2, 16) and np.array_equal(short.encode(texts), z[:, :4])
    assert len(z[0]) == whole.get_embedding_dimension() == 16
    assert Path(out / "model" / "tokenizer.json").exists()


@needs_extras
def test_a_run_goes_on_with_a_table_and_is_the_same_again(place, tiny_model, monkeypatch):
    monkeypatch.setattr("pycse.training.static.run.bundled_model", lambda: tiny_model)  # what a table stands beside
    assert run(tiny_model, "a", "--init", tiny_model)[0] == run(tiny_model, "b", "--init", tiny_model)[0] == 0
    tables = [(place / out / "model" / "model.safetensors").read_bytes() for out in "ab"]
    assert tables[0] == tables[1]
    code, stdout, stderr = run(tiny_model, "c", "--init", place / "a" / "model", "--recipe", "focal")
    assert code == 0, stderr
    assert "the table of" in stdout
    histories = [json.loads((place / out / "metrics.json").read_text()) for out in "ac"]
    assert histories[1]["before"]["lee"]["spearman"] == pytest.approx(histories[0]["after"]["lee"]["spearman"])


BAD = {
    "repeated length": (["--dims", "16,4,4"], "4 is there 2 times"),
    "wider than the encoder": (["--static", "64", "--dims", "64", "--init", "TINY"], "is 32 wide, less than"),
    "full folder": (["--out", "full", "--model", "TINY"], "full has content"),
    "few pairs": (["--batch-size", "64", "--model", "TINY"], "fewer than a batch of 64"),
    "backend": (["--backend", "abacus", "--model", "TINY"], "backend"),
    "no model": (["--init", "full"], "full is no model"),
    "pruned": (["--recipe", "sparsecse", "--model", "TINY"], "removes parameters of encoders"),
}


@needs_extras
@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_a_static_run_changes_nothing(place, tiny_model, case):
    arguments, words = BAD[case]
    before = sorted(place.rglob("*"))
    code, _, stderr = run(tiny_model, "out", *[tiny_model if word == "TINY" else word for word in arguments])
    assert code == 2
    assert stderr.startswith("pycse train: error: ") and words in stderr and stderr.count("\n") == 1
    assert sorted(place.rglob("*")) == before


@needs_extras
def test_several_processes_are_refused(place, tiny_model, monkeypatch):
    from pycse.training import ranks
    from pycse.training.static.run import train_static

    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "exchange", lambda value: [value, value])
    with pytest.raises(UserError, match="--static trains in one process, not 2"):
        train_static(Settings(static=16, model=tiny_model), None)
