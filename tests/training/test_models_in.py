"""Models that are read: what does not match, what asks for more than to be read, and what they are loaded as."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import architectures
import pytest
from tiny_models import needs_extras

from pycse.model_folder import UntrustedModel, check_folder
from pycse.training import names
from pycse.training.errors import UserError

torch = pytest.importorskip("torch")
pytestmark = needs_extras


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of models by architecture, each made once."""
    known = {}

    def get(name, **more):
        key = (name, *more.items())
        if key not in known:
            known[key] = architectures.make(tmp_path_factory.mktemp("made") / name, name, **more)
        return known[key]

    return get


@pytest.fixture
def bert(made, tmp_path):
    """A BERT that a test may damage."""
    return Path(shutil.copytree(made("bert"), tmp_path / "bert"))


def load(folder, **options):
    from pycse.training.encoder import load_encoder

    return load_encoder(str(folder), "cpu", **options)


def refused(folder, *words, **options):
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text
    for word in words:
        assert word in text, text


# ---- weights


def without(*parts):
    return lambda tensors: {k: t for k, t in tensors.items() if not any(part in k for part in parts)}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: {f"module.{k}": v for k, v in t.items()}, ["missing", "save them without 'module.'", "model.module"]),
        (lambda t: {f"wrapped.{k}": v for k, v in t.items()}, ["missing", "save them without 'wrapped.'"]),
        (without("layer.2."), ["encoder.layer.2.attention.output.LayerNorm.bias", "and 13 more are missing and would be random"]),
        (without("word_embeddings"), ["embeddings.word_embeddings.weight is missing"]),
        (lambda t: {k: v[:, :16] if "layer.0.attention.self.query.weight" in k else v for k, v in t.items()},
         ["query.weight (32, 16) instead of (32, 32)", "not of one model"]),
        (lambda t: t | {k.replace("layer.3", "layer.4"): v.clone() for k, v in t.items() if "layer.3" in k}, ["layer.4", "correct the number of layers"]),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, ["not finite"]),
        (without(""), ["missing"]),
    ],
    ids=["module", "wrapped", "layer", "embedding", "shape", "more layers", "nan", "none"],
)  # fmt: skip
def test_weights_that_do_not_match(bert, change, words):
    architectures.weights(bert, change)
    refused(bert, "cannot load the model", *words)


@pytest.mark.parametrize(
    "change",
    [without("pooler"), lambda t: {f"bert.{k}": v for k, v in t.items()} | {"cls.predictions.bias": torch.zeros(81)}],
    ids=["no pooler", "with a head"],
)
def test_weights_that_are_not_used_may_be_absent(bert, change):
    whole = load(bert).encode("a text")
    architectures.weights(bert, change)
    assert (load(bert).encode("a text") == whole).all()


def test_random_weights_of_a_teacher_are_refused(bert):
    from pycse.training.teachers import load_teachers

    architectures.weights(bert, without("layer.1."))
    with pytest.raises(UserError, match=r"^--teacher: cannot load .* missing"):
        load_teachers([str(bert)], "cpu", None)


@pytest.mark.parametrize("command", [("eval",), ("sparsify",), ("train", "--recipe", "focal", "--model")])
def test_every_command_refuses_random_weights(bert, command, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from pycse.cli import app

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    architectures.weights(bert, without("layer.1."))
    text = [] if command == ("eval",) else ["--train-file", "text.txt", "--batch-size", "2"]
    Path("text.txt").write_text("a b\nc d\ne f\n")
    result = CliRunner().invoke(app, [*command, str(bert), *text])
    assert result.exit_code == 2 and "missing" in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "runs").exists()


def test_reports_leave_transformers_as_it_was():
    from transformers import PreTrainedModel

    from pycse.loaded_weights import loading_reports

    before = PreTrainedModel.__dict__["from_pretrained"]
    with loading_reports():
        pass
    assert PreTrainedModel.__dict__["from_pretrained"] is before


# ---- tokenizers


def remove_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


def other_language(folder):
    """Only letters that no text of the probe has; all else is unknown."""
    path = folder / "tokenizer.json"
    known = json.loads(path.read_text())
    known["model"]["vocab"] = {token: k for k, token in enumerate([*architectures.SPECIAL, "ꙮ", "##ꙮ"])}
    path.write_text(json.dumps(known))


def smaller_embedding(folder):
    architectures.weights(folder, lambda t: {k: v[:40] if "word_embeddings" in k else v for k, v in t.items()})
    architectures.edit(folder, "config.json", vocab_size=40)


@pytest.mark.parametrize(
    "damage, words",
    [
        (remove_tokenizer, ["its tokenizer knows no text", "may be missing"]),
        (other_language, ["its tokenizer knows no text"]),
        (smaller_embedding, ["tokens up to number 80", "40 embeddings"]),
    ],
)
def test_tokenizers_that_do_not_fit(bert, damage, words):
    damage(bert)
    refused(bert, *words)


def without_pad(folder, **special):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.no_padding()
    remove_tokenizer(folder)
    PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=64, **special).save_pretrained(folder)


def test_a_tokenizer_without_padding_takes_another_special_token(made, tmp_path):
    folder = Path(shutil.copytree(made("bert"), tmp_path / "bert"))
    whole = load(folder).encode(["a", "a longer text"])
    without_pad(folder, eos_token="[SEP]")
    encoder = load(folder)
    assert encoder.tokenizer.pad_token == "[SEP]"
    torch.testing.assert_close(torch.tensor(encoder.encode(["a", "a longer text"])), torch.tensor(whole))
    without_pad(folder)
    refused(folder, "no padding token", "set pad_token")


def cut_to_nothing(vocabulary):
    vocabulary["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 9}


@pytest.mark.parametrize(
    "damage", [cut_to_nothing, lambda known: known.pop("model"), lambda known: known["model"].update(vocab=5)]
)
def test_damaged_tokenizers(bert, damage):
    """Also what makes tokenizers panic, which is no Exception."""
    known = json.loads((bert / "tokenizer.json").read_text())
    damage(known)
    (bert / "tokenizer.json").write_text(json.dumps(known))
    refused(bert)


# ---- lengths


@pytest.mark.parametrize(
    "name, limit", [("roberta", 63), ("xlm-roberta", 63), ("mpnet", 62), ("bert", 64), ("electra", 64), ("llama", 64)]
)
def test_positions_limit_the_length(made, name, limit):
    """RoBERTa and its like count positions from padding_idx + 1."""
    from pycse.training.encoder import check_for_training

    encoder = load(made(name))
    assert encoder.max_seq_length == limit
    encoder.encode(["a " * 200])
    with pytest.raises(UserError, match=f"this model reads at most {limit} tokens"):
        check_for_training(encoder, False, limit + 1)


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_without_a_length_limit(made, name):
    from pycse.training.evaluate import ScoredPairs, evaluate

    encoder = load(made(name, limit=None))
    texts = ["a " * 700, "b", "c d"]
    assert encoder.encode(texts).shape == (3, 32)
    pairs = ScoredPairs("set", texts, texts[::-1], [0.0, 1.0, 2.0], 2.0)
    assert "spearman" in evaluate(encoder, [pairs])["set"]


def test_static_tables_are_read_and_evaluated(tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from typer.testing import CliRunner

    from pycse.cli import app

    architectures.tokenizer(tmp_path)
    words = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    folder = tmp_path / "table"
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=16)], device="cpu").save_pretrained(str(folder))
    assert load(folder).encode(["", "a b"]).shape == (2, 16)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, ["eval", str(folder), "--device", "cpu"])
    assert result.exit_code == 0 and "spearman" in result.stdout, result.stderr
    remove = json.loads((folder / "tokenizer.json").read_text())
    remove["model"]["vocab"] = {"[UNK]": 1, "[PAD]": 0}
    (folder / "tokenizer.json").write_text(json.dumps(remove))
    refused(folder, "knows no text")


# ---- dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_precision_is_remembered(bert, dtype):
    from pycse.training.encoder import stored_dtype

    architectures.weights(bert, lambda t: {k: v.to(getattr(torch, dtype)) for k, v in t.items()})
    architectures.edit(bert, "config.json", dtype=dtype)
    as_stored, trained = load(bert), load(bert, dtype="float32")
    assert as_stored.dtype == getattr(torch, dtype)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert stored_dtype(trained) == stored_dtype(as_stored) == getattr(torch, dtype)
    assert load(bert, attn_implementation="eager")[0].auto_model.config._attn_implementation == "eager"


# ---- trust


def pickled(folder, payload=None):
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors if payload is None else payload, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


class Shell:
    """What a hostile pickle does when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_pickles_are_read_only_where_that_is_allowed(bert, tmp_path):
    whole = load(bert).encode("a text")
    pickled(bert)
    refused(bert, "pytorch_model.bin", "--allow-pickle")
    assert (load(bert, allow_pickle=True).encode("a text") == whole).all()
    torch.save({"a": Shell(tmp_path / "ran")}, bert / "pytorch_model.bin")
    refused(bert, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


DECOYS = {
    "none": lambda folder: None,
    "another name": lambda folder: save_tensors(folder, "a.safetensors"),
    "an index": lambda folder: (save_tensors(folder, "a.safetensors"), architectures.edit(folder, "model.safetensors.index.json", weight_map={"linear.weight": "a.safetensors"})),
    "a name in the settings": lambda folder: (save_tensors(folder, "a.safetensors"), architectures.edit(folder, "config.json", transformers_weights="a.safetensors")),
    "a link to nothing": lambda folder: link("model.safetensors", "nothing")(folder),
}  # fmt: skip


def save_tensors(folder, name):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1, dtype=torch.float32)}, folder / name)


@pytest.mark.parametrize("decoy", DECOYS)
def test_safetensors_that_nobody_reads_hide_no_pickle(made, tmp_path, decoy):
    """Of a module of sentence-transformers, which takes the pickle where there is no model.safetensors."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    import pycse.sparse

    encoder = SentenceTransformer(str(made("bert")), device="cpu")
    encoder.append(Dense(32, 8))
    folder = tmp_path / "whole"
    encoder.save_pretrained(str(folder), create_model_card=False)
    check_folder(folder)
    pickled(folder / "2_Dense")
    DECOYS[decoy](folder / "2_Dense")
    refused(folder, "2_Dense has its weights as a pickle (pytorch_model.bin)", "--allow-pickle")
    with pytest.raises(UntrustedModel):
        pycse.sparse.load(folder)
    assert load(folder, allow_pickle=True).encode("a").shape == (8,)


def test_pickles_beside_shards_are_not_read(bert):
    """Folders with both are common, and transformers is told which to take."""
    from safetensors.torch import load_file

    tensors = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").rename(bert / "shard.safetensors")
    names = dict.fromkeys(tensors, "shard.safetensors")
    architectures.edit(bert, "model.safetensors.index.json", weight_map=names, metadata={})
    architectures.edit(
        bert, "pytorch_model.bin.index.json", weight_map=dict.fromkeys(tensors, "shard.bin"), metadata={}
    )
    (bert / "shard.bin").write_text("no pickle")
    assert load(bert).encode("a").shape == (32,)


def modules(*entries):
    return lambda folder: (folder / "modules.json").write_text(json.dumps(list(entries)))


def entry(path="", kind="sentence_transformers.models.Transformer", **more):
    return {"idx": 0, "name": "0", "path": path, "type": kind} | more


def settings(file, **values):
    return lambda folder: architectures.edit(folder, file, **values)


def link(name, target):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def inner(name, file="config.json", pickle=False, **values):
    def change(folder):
        (folder / name).mkdir(parents=True)
        architectures.edit(folder / name, file, **values)
        if pickle:
            torch.save({}, folder / name / "pytorch_model.bin")

    return change


def both(*changes):
    return lambda folder: [change(folder) for change in changes] and None


HOSTILE = {
    "foreign module": (modules(entry(kind="evil.Model")), ["modules.json", "foreign code (evil.Model)", "--trust-remote-code"]),
    "module of another package": (modules(entry(kind="os.system")), ["foreign code (os.system)"]),
    "no class of theirs": (modules(entry(kind="sentence_transformers.util.misc.import_from_string")), ["foreign code"]),
    "auto_map": (settings("config.json", auto_map={"AutoModel": "evil.Model"}), ["config.json", "foreign code (evil.Model)"]),
    "auto_map of another place": (settings("config.json", auto_map={"AutoModel": "them/repo--evil.Model"}), ["them/repo--evil.Model"]),
    "auto_map like ours": (settings("config.json", auto_map={"AutoModel": "shrunk_encoders.ShrunkBertModel"}), ["foreign code"]),
    "auto_map of a tokenizer": (settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}), ["tokenizer_config.json", "foreign code"]),
    "module above": (modules(entry("../other")), ["modules.json", "leads out of the folder"]),
    "module below and above": (modules(entry("a/../../other")), ["leads out of the folder"]),
    "module at the root": (modules(entry("/etc")), ["leads out of the folder, to /etc"]),
    "module on a drive": (modules(entry("C:\\models")), ["leads out of the folder"]),
    "module with a NUL": (modules(entry("a\0b")), ["leads out of the folder"]),
    "modules that are none": (modules("x"), ["must have a path and a type"]),
    "an object of modules": (lambda folder: (folder / "modules.json").write_text("{}"), ["must be a list"]),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json cannot be read as JSON"]),
    "deep JSON": (lambda folder: (folder / "config.json").write_text("[" * 100_000), ["config.json cannot be read as JSON"]),
    "JSON that is less deep": (lambda folder: (folder / "config.json").write_text('{"a":' * 900 + "1" + "}" * 900), ["config.json"]),
    "linked weights": (link("model.safetensors", "../secret"), ["model.safetensors leads out of the folder"]),
    "linked settings": (link("tokenizer.json", "/etc/passwd"), ["tokenizer.json leads out"]),
    "linked module": (both(link("inner", ".."), modules(entry("inner"))), ["leads out"]),
    "shards elsewhere": (settings("model.safetensors.index.json", weight_map={"a": "../../secret.safetensors"}), ["index.json leads out"]),
    "shards at the root": (settings("model.safetensors.index.json", weight_map={"a": "/secret.safetensors"}), ["index.json leads out"]),
    "no shards": (settings("model.safetensors.index.json", weight_map=[1]), ["weight_map of file names"]),
    "weights of another name": (settings("config.json", transformers_weights="x.bin"), ["must name a safetensors file"]),
    "weights elsewhere": (settings("config.json", transformers_weights="../secret.safetensors"), ["config.json leads out"]),
    "weights of a link": (both(inner("w"), link("w/x.safetensors", "../../secret"), settings("config.json", transformers_weights="w/x.safetensors")), ["leads out"]),
    "shards of a pickle": (settings("model.safetensors.index.json", weight_map={"a": "x.bin"}), ["no safetensors (x.bin)", "--allow-pickle"]),
    "a hidden index": (both(inner("w", file="x.safetensors.index.json", weight_map={"a": "../secret.safetensors"}),
                            settings("config.json", transformers_weights="w/x.safetensors.index.json")), ["x.safetensors.index.json leads out"]),
    "a hidden index of a pickle": (both(inner("w", file="x.safetensors.index.json", weight_map={"a": "w/x.bin"}),
                                        settings("config.json", transformers_weights="w/x.safetensors.index.json")), ["no safetensors (w/x.bin)"]),
    "a hidden index below": (settings("config.json", text_config={"transformers_weights": "../x.safetensors.index.json"}), ["config.json leads out"]),
    "attention of another place": (settings("config.json", attn_implementation="them/kernel"), ["code of another place"]),
    "tokenizer elsewhere": (both(modules(entry()), settings("sentence_bert_config.json", tokenizer_name_or_path="/else")), ["tokenizer /else"]),
    "arguments": (both(modules(entry()), settings("sentence_bert_config.json", model_args={"weights_only": False})), ["model_args", "weights_only"]),
    "arguments that are a path": (both(modules(entry()), settings("sentence_bert_config.json", model_kwargs={"dtype": "../x"})), ["model_kwargs"]),
    "attention below": (settings("config.json", text_config={"_attn_implementation": "them/kernel"}), ["code of another place (them/kernel)"]),
    "code below": (settings("config.json", text_config={"auto_map": {"AutoModel": "evil.Model"}}), ["foreign code (evil.Model)"]),
    "a route's pickle": (both(modules(entry("", "sentence_transformers.models.Router")), inner("query", pickle=True)), ["pytorch_model.bin"]),
    "a route's code": (both(modules(entry("", "sentence_transformers.models.Router")), inner("query/0_Transformer", auto_map={"AutoModel": "evil.Model"})), ["foreign code"]),
    "a module's adapter": (both(modules(entry("0_Transformer")), inner("0_Transformer", file="adapter_config.json")), ["adapter", "merge"]),
    "an adapter": (settings("adapter_config.json", base_model_name_or_path="/else"), ["adapter", "merge"]),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_folders_that_ask_for_more_than_to_be_read(bert, case):
    import pycse.sparse

    change, words = HOSTILE[case]
    (bert / "evil.py").write_text("raise SystemExit('this ran')")
    change(bert)
    refused(bert, *words)
    with pytest.raises(UntrustedModel):
        pycse.sparse.load(bert)


def test_foreign_code_runs_where_that_is_allowed(bert):
    (bert / "own.py").write_text("from transformers import BertModel\nclass Own(BertModel):\n    told = 'own code'\n")
    architectures.edit(bert, "config.json", auto_map={"AutoModel": "own.Own"})
    refused(bert, "foreign code (own.Own)")
    assert load(bert, trust_remote_code=True)[0].auto_model.told == "own code"


def test_links_within_the_cache_of_hugging_face_are_inside(made, tmp_path):
    repository = tmp_path / "models--them--encoder"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    shutil.copytree(made("bert"), snapshot)
    blobs.mkdir()
    for k, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(k))
        file.symlink_to(f"../../blobs/{k}")
    check_folder(snapshot)
    assert load(snapshot).encode("a").shape == (32,)
    (tmp_path / "linked").symlink_to(repository)
    check_folder(tmp_path / "linked" / "snapshots" / "0123")
    (snapshot / "vocab.txt").symlink_to("../../../secret")
    refused(snapshot, "leads out")


@pytest.mark.parametrize("target", ["/", "..", "../secret", "real"])
def test_blobs_that_are_a_link_are_outside(made, tmp_path, target):
    """As an archive may have them, with links through them to wherever they lead."""
    import pycse.sparse

    repository = tmp_path / "unpacked"
    snapshot = Path(shutil.copytree(made("bert"), repository / "snapshots" / "0123"))
    secret = tmp_path / "secret" / "a"
    secret.parent.mkdir()
    (snapshot / "model.safetensors").rename(secret)
    (repository / "real").symlink_to(secret.parent)
    (repository / "blobs").symlink_to(target)
    (snapshot / "model.safetensors").symlink_to(secret)
    refused(snapshot, "model.safetensors leads out of the folder")
    with pytest.raises(UntrustedModel):
        pycse.sparse.load(snapshot)


# ---- names


def cached(home, name, folder):
    """A model in a cache of Hugging Face."""
    repository = home / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(folder, repository / "snapshots" / ("0" * 40)))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A current folder, an empty cache, and no network."""
    monkeypatch.setattr(names, "hub_answers", lambda: False)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_without_a_network_ids_are_those_of_the_cache(offline, made):
    folder = cached(offline / "cache", "them/encoder", made("bert"))
    short = cached(offline / "cache", "sentence-transformers/short", made("bert"))
    assert names.resolve_model("them/encoder") == (str(folder), True)
    assert names.resolve_model("short") == (str(short), True)
    assert load(names.resolve_model("short")[0]).encode("a").shape == (32,)


@pytest.mark.parametrize(
    "folders, name, hint",
    [
        ([], "bundeld", "did you mean bundled?"),
        (["my-encoder"], "my-encodr", "did you mean my-encoder?"),
        (["models/first", "models/second"], "models/secnd", "did you mean models/second"),
        (["models/first"], "./models/frist", "did you mean models/first?"),
        (["runs/focal-1/model"], "runs/focl-1/model", "did you mean runs/focal-1/model?"),
        (["runs/focal-1/model"], "a/b/c/d", None),
        (["sub/x"], "*[!?", None),
    ],
)
def test_names_like_a_wrong_one(offline, folders, name, hint):
    for folder in folders:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        names.resolve_model(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert (hint in str(caught.value)) if hint else "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "~nobody-of-that-name/x", "", "a b/c d"])
def test_names_that_no_folder_can_have(offline, name):
    with pytest.raises(UserError, match="no such model folder|no model"):
        names.resolve_model(name)


def test_a_typo_is_known_before_anything_heavy_is_imported(tmp_path):
    """Nothing listens at the address: the answer is no, at once."""
    script = (
        "import sys\nfrom pycse.training.names import resolve_model\n"
        "try: resolve_model('bundeld')\nexcept Exception as error: print(error)\n"
        "print(sorted({'transformers', 'sentence_transformers', 'datasets'} & set(sys.modules)))"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [
        "no model bundeld: there is no such folder, Hugging Face's cache has none of that name, and Hugging Face cannot "
        "be reached; did you mean bundled?",
        "[]",
    ]


def test_a_hub_that_is_silent_is_not_waited_for(monkeypatch):
    """A server that takes connections and says nothing."""
    import socket

    from huggingface_hub import constants

    monkeypatch.setattr(names, "PATIENCE", 0.05)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        names.hub_answers.cache_clear()
        try:
            assert not names.hub_answers()
        finally:
            names.hub_answers.cache_clear()


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """A server of one repository, as Hugging Face's interface is; the names of the files that were asked for."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from huggingface_hub import constants

    folder = Path(shutil.copytree(made("bert"), tmp_path / "repository"))
    for extra in ("onnx/model.onnx", "evil.py", "training_args.bin"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_text("not to be fetched")
    sha, asked = "1" * 40, []

    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            path = self.path.split("?")[0]
            files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
            if path.startswith("/api/models/them/encoder/tree"):
                return self.answer(
                    json.dumps([{"type": "file", "path": f, "size": 1, "oid": "0"} for f in files]).encode(), body
                )
            if path.startswith("/api/models/them/encoder"):
                known = {
                    "id": "them/encoder",
                    "modelId": "them/encoder",
                    "sha": sha,
                    "siblings": [{"rfilename": f} for f in files],
                }
                return self.answer(json.dumps(known).encode(), body)
            name = path.removeprefix(f"/them/encoder/resolve/{sha}/")
            if name not in files:
                return self.answer(b"", body, 404)
            asked.append(name)
            self.answer((folder / name).read_bytes(), body)

        def answer(self, content, body, code=200):
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{abs(hash(content))}"')
            self.send_header("X-Repo-Commit", sha)
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "cache"))
    answers = names.hub_answers
    answers.cache_clear()
    yield folder, asked
    answers.cache_clear()
    server.shutdown()
    server.server_close()


def test_of_an_id_only_what_may_be_read_is_fetched(hub, made, monkeypatch):
    folder, asked = hub
    assert names.resolve_model("them/encoder") == ("them/encoder", False)
    assert (load("them/encoder").encode("a") == load(made("bert")).encode("a")).all()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(asked)
    assert not {"onnx/model.onnx", "evil.py", "training_args.bin"} & set(asked)
    with pytest.raises(UserError, match=r"cannot load the model them/other \("):
        load("them/other")
    # And without a network from the cache.
    monkeypatch.setattr(names, "hub_answers", lambda: False)
    found, local = names.resolve_model("them/encoder")
    assert local and (load(found).encode("a") == load(made("bert")).encode("a")).all()
