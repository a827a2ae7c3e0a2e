"""Models that are saved: what is loaded again is what was trained, and its README.md says how."""

import json
import os
import re
import shutil
from pathlib import Path

import architectures
import pytest
from tiny_models import needs_extras

from pycse.training.errors import UserError
from pycse.training.settings import Settings

torch = pytest.importorskip("torch")
pytestmark = needs_extras

TEXTS = ["a b c", "the quick brown fox", "x", "12 monkeys, all of them in a row."]
SENTENCES = [f"the {a} {b} is {c}" for a in ("red", "old", "big") for b in ("cat", "ship") for c in ("here", "gone")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    known = {}

    def get(name):
        if name not in known:
            known[name] = architectures.make(tmp_path_factory.mktemp("made") / name, name)
        return known[name]

    return get


def load(folder, **options):
    from pycse.training.encoder import load_encoder

    return load_encoder(str(folder), "cpu", **options)


def theirs(folder):
    """As sentence-transformers loads it, without pycse."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def moved(encoder):
    """As a training moves weights."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


# ---- layers


SPECIAL = ("t5", "modernbert")  # whose first layer is


@pytest.mark.parametrize(
    "name, keep",
    [(name, [1, 3]) for name in architectures.MADE if name != "albert"] + [(name, [0, 2]) for name in SPECIAL],
)
def test_what_is_left_of_the_layers_is_what_is_loaded(made, name, keep, tmp_path):
    from pycse.training.encoder import keep_layers
    from pycse.training.saving import check_saves, save_model

    encoder = load(made(name))
    keep_layers(encoder, keep)
    settings = Settings(layers=",".join(map(str, keep)))
    if name in SPECIAL and keep[0]:
        with pytest.raises(UserError, match=r"^--layers 1,3: .*keep layer 0, which is special"):
            check_saves(encoder, settings, keep)
        # Had it been trained: the folder is there, and nothing says that it is good.
        with pytest.raises(UserError, match=r"^the model in .*model (cannot be loaded|is another one)"):
            save_model(moved(encoder), tmp_path / "model", settings)
        assert not (tmp_path / "model" / "README.md").exists()
        return
    random = torch.get_rng_state()
    check_saves(encoder, settings, keep)
    assert torch.equal(torch.get_rng_state(), random)
    expected = moved(encoder).encode(TEXTS)
    save_model(encoder, tmp_path / "model", settings)
    assert (theirs(tmp_path / "model").encode(TEXTS) == expected).all()


@pytest.mark.parametrize("name", ["albert", "t5", "llama"])
def test_whole_models_of_any_architecture(made, name, tmp_path):
    from pycse.training.saving import check_saves, save_model

    encoder = load(made(name))
    check_saves(encoder, Settings(), None)
    expected = moved(encoder).encode(TEXTS)
    save_model(encoder, tmp_path / "model", Settings())
    assert (theirs(tmp_path / "model").encode(TEXTS) == expected).all()


def test_others_may_read_what_is_saved(made, tmp_path):
    """As far as the umask says; safetensors itself makes files of one user."""
    from pycse.training.saving import save_model

    before = os.umask(0o027)
    try:
        save_model(load(made("bert")), tmp_path / "model", Settings())
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "model").iterdir() if file.is_file()} == {"0o640"}


def test_layers_that_are_shared_cannot_be_cut(made):
    from pycse.training.encoder import keep_layers

    with pytest.raises(UserError, match="cannot find the layers of a AlbertModel"):
        keep_layers(load(made("albert")), [0, 2])


# ---- dtypes


def dtypes(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as tensors:
        return {str(tensors.get_tensor(name).dtype).removeprefix("torch.") for name in tensors.keys()}  # noqa: SIM118


@pytest.fixture
def stored(made, tmp_path):
    """A BERT whose weights are stored in a dtype."""

    def make(dtype):
        folder = Path(shutil.copytree(made("bert"), tmp_path / "stored"))
        architectures.weights(folder, lambda t: {k: v.to(getattr(torch, dtype)) for k, v in t.items()})
        architectures.edit(folder, "config.json", dtype=dtype)
        return folder

    return make


@pytest.mark.parametrize(
    "stored_in, asked, saved_in",
    [
        ("bfloat16", "as-loaded", "bfloat16"),
        ("float16", "as-loaded", "float16"),
        ("float32", "as-loaded", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_weights_train_in_float32_and_are_saved_as_asked(stored, stored_in, asked, saved_in, tmp_path):
    from pycse.training.encoder import loading_options
    from pycse.training.saving import save_model

    settings = Settings(save_dtype=asked)
    encoder = moved(load(stored(stored_in), **loading_options(settings, training=True)))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    save_model(encoder, tmp_path / "model", settings)
    assert dtypes(tmp_path / "model") == {saved_in}
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    close = torch.nn.functional.cosine_similarity(
        torch.tensor(encoder.encode(TEXTS)), torch.tensor(theirs(tmp_path / "model").encode(TEXTS)).float()
    )
    assert (close > 0.999).all()


def test_weights_that_16_bits_cannot_hold(made, tmp_path):
    from pycse.training.saving import save_model

    encoder = load(made("bert"))
    with torch.no_grad():
        encoder[0].auto_model.encoder.layer[3].output.LayerNorm.weight.fill_(1e6)
    with pytest.raises(UserError, match="float16 cannot hold these weights"):
        save_model(encoder, tmp_path / "model", Settings(save_dtype="float16"))


def test_a_folder_that_was_changed_behind_our_back(made, tmp_path, monkeypatch):
    """What is compared is what lies on the disk."""
    from pycse.training import saving

    encoder, write = load(made("bert")), saving.write

    def written_and_damaged(one, folder):
        write(one, folder)
        architectures.weights(folder, lambda t: t | {k: v * 2 for k, v in t.items() if "layer.1.output" in k})

    monkeypatch.setattr(saving, "write", written_and_damaged)
    with pytest.raises(UserError, match=r"is another one when it is loaded again: 0\.\S+layer\.1\.output"):
        saving.save_model(encoder, tmp_path / "model", Settings())


# ---- pooling and head


def pooled(encoder, kind):
    """The pooling of the papers from what every layer put out."""
    features = encoder.preprocess(TEXTS)
    with torch.no_grad():
        states = (
            encoder[0]
            .auto_model(
                input_ids=features["input_ids"], attention_mask=features["attention_mask"], output_hidden_states=True
            )
            .hidden_states
        )
    mask = features["attention_mask"][:, :, None].float()
    if kind == "cls":
        return states[-1][:, 0]
    tokens = (states[1] + states[-1]) / 2 if kind == "first-last" else states[-1]
    return (tokens * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("bert", "cls"),
        ("bert", "mean"),
        *((name, "first-last") for name in ("bert", "mpnet", "t5", "modernbert", "llama")),
    ],
)
def test_pooling_is_that_of_the_papers_and_saved(made, name, kind, tmp_path):
    from pycse.training.encoder import keep_layers
    from pycse.training.pooling import set_pooling
    from pycse.training.saving import save_model

    encoder = load(made(name))
    keep_layers(encoder, [0, 1, 3])
    set_pooling(encoder, kind)
    expected = pooled(encoder, kind)
    torch.testing.assert_close(torch.tensor(encoder.encode(TEXTS)), expected, rtol=1e-4, atol=1e-5)
    save_model(encoder, tmp_path / "model", Settings())
    assert (theirs(tmp_path / "model").encode(TEXTS) == encoder.encode(TEXTS)).all()
    # From there on: other layers, and another pooling.
    again = load(tmp_path / "model")
    assert not [name for name, p in again.named_parameters() if "layer_weights" in name and p.requires_grad]
    keep_layers(again, [0, 2])
    torch.testing.assert_close(torch.tensor(again.encode(TEXTS)), pooled(again, kind), rtol=1e-4, atol=1e-5)
    set_pooling(again, "mean")
    torch.testing.assert_close(torch.tensor(again.encode(TEXTS)), pooled(again, "mean"), rtol=1e-4, atol=1e-5)
    assert len(again) == 2


def test_layers_that_are_weighed_in_another_way_are_not_cut(made):
    from pycse.training.encoder import keep_layers
    from pycse.training.pooling import set_pooling

    encoder = load(made("bert"))
    set_pooling(encoder, "first-last")
    with torch.no_grad():
        encoder[1].layer_weights[1] = 0.5
    with pytest.raises(UserError, match="weighs each of its layers"):
        keep_layers(encoder, [0, 2])


@pytest.mark.parametrize("first_last", [False, True])
@pytest.mark.parametrize("kind", ["cls", "mean", "first-last"])
def test_modules_before_the_pooling_stay_there(made, kind, first_last):
    from sentence_transformers.sentence_transformer.modules import Dense

    from pycse.training.pooling import replace_modules, set_pooling

    encoder = load(made("bert"))
    set_pooling(encoder, "first-last" if first_last else "mean")
    *before, pooling = encoder
    tokens = Dense(32, 32, module_input_name="token_embeddings", module_output_name="token_embeddings")
    replace_modules(encoder, [*before, tokens, pooling])
    modules, states = list(encoder), encoder[0].auto_model.config.output_hidden_states
    with pytest.raises(UserError, match=f"--pooling {kind}: this model has Dense between"):
        set_pooling(encoder, kind)
    assert list(encoder) == modules and encoder[0].auto_model.config.output_hidden_states == states
    # Behind the pooling it stays as it is.
    replace_modules(encoder, [*before, pooling, Dense(32, 8)])
    set_pooling(encoder, kind)
    assert [type(m).__name__ for m in encoder][-2:] == ["Pooling", "Dense"]


def test_a_head_is_there_in_training_alone(made, tmp_path):
    from pycse.loaded_weights import embed
    from pycse.training.heads import add_head, remove_head
    from pycse.training.saving import save_model

    encoder = load(made("bert"))
    plain = encoder.encode(TEXTS, convert_to_tensor=True).clone()
    torch.manual_seed(5)
    add_head(encoder, "mlp")
    head = encoder[2].dense
    assert 0.018 < head.weight.std() < 0.022 and not head.bias.any()
    assert torch.equal(encoder.encode(TEXTS, convert_to_tensor=True), plain)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    encoder.train()
    seen = encoder(encoder.preprocess(TEXTS))["sentence_embedding"]
    torch.testing.assert_close(seen, torch.tanh(plain @ head.weight.T + head.bias), rtol=1e-4, atol=1e-6)
    seen.sum().backward()
    assert head.weight.grad is not None and torch.equal(embed(encoder, TEXTS).detach(), plain)
    save_model(encoder, tmp_path / "model", Settings())
    assert encoder[2].dense is head and "head" in dict(encoder.named_children())
    assert len(json.loads((tmp_path / "model" / "modules.json").read_text())) == 2
    assert (theirs(tmp_path / "model").encode(TEXTS) == plain.numpy()).all()
    assert remove_head(encoder).dense is head and len(encoder) == 2 and remove_head(encoder) is None


def test_pooling_and_head_need_tokens():
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models

    from pycse.training.heads import add_head
    from pycse.training.pooling import set_pooling

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    table = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=4)], device="cpu")
    with pytest.raises(UserError, match="--pooling cls: this model has no pooling"):
        set_pooling(table, "cls")
    with pytest.raises(UserError, match="--head mlp: this model pools no tokens"):
        add_head(table, "mlp")


@pytest.mark.parametrize(
    "given, word",
    [
        ({"pooling": "max"}, "--pooling max: unknown; use one of cls, mean, first-last"),
        ({"head": "linear"}, "--head linear: unknown; use one of mlp"),
        ({"save_dtype": "int8"}, "--save-dtype int8: unknown; use one of as-loaded, float32"),
        ({"dtype": "float16"}, "--dtype float16: unknown; use one of float32, bfloat16"),
        ({"static": 8, "head": "mlp"}, "--head does not go with --static"),
        ({"static": 8, "pooling": "cls"}, "--pooling does not go with --static"),
        ({"attn_implementation": "them/kernel"}, "--attn-implementation them/kernel: unknown"),
    ],
)
def test_settings_that_are_none(given, word):
    with pytest.raises(UserError, match=re.escape(word)):
        Settings(**given).check()


# ---- whole runs, and what their README.md says


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.txt").write_text("\n".join(SENTENCES) + "\n")
    return tmp_path


def pycse(*arguments):
    from typer.testing import CliRunner

    from pycse.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def loaded_as_told(readme, folder):
    """What the first block of code of a card makes: its embeddings of the texts that it has."""
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1].replace("path/to/this/folder", str(folder))
    told = {}
    exec(code, told)
    assert told["embeddings"].shape[0] == 2
    return told["model"]


RUNS = {
    "focal": (["--recipe", "focal"], ["recipe focal (Hou & Li", "hou-li", "| m | 0.3 |"]),
    "head": (["--recipe", "simcse", "--pooling", "first-last", "--head", "mlp"], ["gao-etal-2021-simcse", "| head | mlp |", "| pooling | first-last |"]),
    "distillcse": (["--recipe", "distillcse", "--layers", "0,2", "--save-dtype", "bfloat16"], ["xu-etal-2023", "weights in bfloat16", "- teacher: "]),
    "sparsecse": (["--recipe", "sparsecse", "--granularity", "weight", "--sparsity", "0.5"], ["pycse.sparse.load", "an2023sparse", "removed: "]),
    "heads": (["--recipe", "sparsecse", "--granularity", "head", "--sparsity", "0.5"], ["pycse.sparse.load", "does not know layers of these sizes"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_runs_and_their_cards(made, kind, place):
    options, words = RUNS[kind]
    result = pycse(
        "train", "--model", made("bert"), "--train-file", "private.txt", "--out", "out", "--device", "cpu",
        "--batch-size", 4, "--steps", 2, "--eval-steps", 2, "--lr", 0.001, *options,
    )  # fmt: skip
    assert result.stderr == ""
    folder = place / "out" / "model"
    card = (folder / "README.md").read_text(encoding="utf-8")
    for word in (
        "library_name: sentence-transformers",
        "- pycse\n",
        "# bert, ",
        "| lee | spearman |",
        "| train_file | private.txt |",
        *words,
    ):
        assert word in card, card
    # Nothing of the text, and no folder of this machine.
    assert "ship" not in card and str(place) not in card and str(made("bert").parent) not in card
    assert "base_model" not in card and "\n- text: 12 sentences" in card
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    assert f"{metrics['after']['lee']['spearman']:.4f}" in card
    model = loaded_as_told(card, folder)
    if kind == "head":
        assert metrics["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert "head" not in dict(model.named_children())
    if kind in ("focal", "head"):
        assert (model.encode(TEXTS) == theirs(folder).encode(TEXTS)).all()


def test_cards_of_sparsify_and_of_tables(made, place):
    pycse("sparsify", made("bert"), "--train-file", "private.txt", "--out", "thin", "--batch-size", 4, "--card-text")
    card = (place / "thin" / "model" / "README.md").read_text()
    assert "pruned with [pycse]" in card and f"- {SENTENCES[0]}\n" in card and SENTENCES[3] not in card
    assert "| card_text |" not in card
    loaded_as_told(card, place / "thin" / "model")
    pycse(
        "train", "--static", 32, "--model", made("bert"), "--train-file", "private.txt", "--out", "table", "--steps", 2,
        "--batch-size", 4, "--dims", "32,16", "--save-dtype", "float16",
    )  # fmt: skip
    card = (place / "table" / "model" / "README.md").read_text()
    assert "A static table" in card and "truncate_dim=16; trained at 32, 16" in card and "kusupati" in card
    loaded_as_told(card, place / "table" / "model")
    assert dtypes(place / "table" / "model") == {"float16"}


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_runs_of_encoders_without_a_length_limit_or_padding(name, place):
    """Their tokenizer has a limit of 1e30, and an ending token to pad with; Llama has no dropout to make positives by."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    folder = architectures.make(place / name, name, limit=None)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.no_padding()
    for file in folder.glob("token*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="[SEP]").save_pretrained(folder)
    (place / "pairs.tsv").write_text("".join(f"{s}\t{s} now\n" for s in SENTENCES))
    pycse(
        "train", "--model", folder, "--train-file", "pairs.tsv", "--out", "out", "--device", "cpu", "--recipe", "simcse",
        "--batch-size", 4, "--steps", 1, "--lr", 0.001,
    )  # fmt: skip
    assert theirs(place / "out" / "model").encode(["a " * 700, "b"]).shape == (2, 32)


def test_a_model_with_code_of_its_own(made, place):
    """Runs where that is allowed, in what is saved too; its card says so."""
    folder = Path(shutil.copytree(made("bert"), place / "own"))
    (folder / "own.py").write_text("from transformers import BertModel\nclass Own(BertModel):\n    told = 'own code'\n")
    architectures.edit(folder, "config.json", auto_map={"AutoModel": "own.Own"})
    pycse(
        "train", "--model", folder, "--train-file", "private.txt", "--out", "out", "--device", "cpu", "--recipe", "simcse",
        "--batch-size", 4, "--steps", 1, "--trust-remote-code",
    )  # fmt: skip
    card = (place / "out" / "model" / "README.md").read_text()
    assert "trust_remote_code=True)  # if you trust" in card
    assert loaded_as_told(card, place / "out" / "model")[0].auto_model.told == "own code"

    from pycse.training.trainer import put_weights

    encoder = load(folder, trust_remote_code=True)
    put_weights(encoder, place / "out" / "model")  # as a run that goes on does it
    assert (encoder.encode(TEXTS) == loaded_as_told(card, place / "out" / "model").encode(TEXTS)).all()


def test_the_base_of_a_card():
    from pycse.training.data import Text
    from pycse.training.model_card import base_model, shown
    from pycse.training.run import Run

    def base(**settings):
        text = Text("a", [("a",)], {})
        return base_model(Run(Settings(**settings), text, "a", [0], 1, 1, "cpu", 1))

    assert base() == base(init="bundled", static=8) == "sentence-transformers/all-MiniLM-L6-v2"
    assert base(model="them/encoder") == "them/encoder"
    assert base(model="/home/me/encoder") is base(model="./encoder") is base(model="a/b/c") is None
    assert (
        shown("/home/me/encoder, uncut") == "encoder, uncut" and shown(["them/encoder", "a/b/c"]) == "them/encoder, c"
    )
