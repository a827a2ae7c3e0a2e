"""Masks and sizes in a model's folder that fit no layer: refused before anything is made of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import edit, make, weights
from tiny_models import needs_extras

from pycse.training.errors import UserError

pytestmark = needs_extras
NAME = "encoder.layer.1.output.dense"
KEY = f"{NAME}.mask_bits"  # (32, 2) for a weight (32, 64)


def saved(folder, name, **options):
    """A model whose parameters were removed by chance."""
    from pycse.sparse import sparsify
    from pycse.training.encoder import load_encoder

    encoder = load_encoder(str(make(folder / "dense", name)), "cpu")
    torch.manual_seed(3)
    sparsify(encoder, {name: torch.rand_like(p) for name, p in encoder.named_parameters()}, 0.5, **options)
    encoder.save_pretrained(str(folder / "sparse"), create_model_card=False)
    return folder / "sparse"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    made = {
        "masks": saved(tmp_path_factory.mktemp("masks"), "bert", granularity="weight"),
        "heads": saved(tmp_path_factory.mktemp("heads"), "mpnet", granularity="head"),
        "neurons": saved(tmp_path_factory.mktemp("neurons"), "bert", granularity="neuron", scope="global"),
    }
    return made.get


def refused(folder, *words):
    """By pycse.sparse.load and by the commands, each with one line."""
    from pycse.sparse import load
    from pycse.training.encoder import load_encoder

    with pytest.raises((ValueError, TypeError)) as caught:
        load(folder)
    for word in words:
        assert word in str(caught.value), caught.value
    with pytest.raises(UserError) as told:
        load_encoder(str(folder), "cpu")
    assert "\n" not in str(told.value)


def put(name, tensor):
    return lambda tensors: tensors | {name: tensor(tensors) if callable(tensor) else tensor}


CASES = {
    "rows": (put(KEY, lambda t: t[KEY][:-1]), [KEY, "must be I32 of shape [32, 2]", "shape [31, 2]"]),
    "columns": (put(KEY, lambda t: t[KEY].repeat(1, 2)), [KEY, "shape [32, 4]"]),
    "flat": (put(KEY, lambda t: t[KEY].flatten()), [KEY, "shape [64]"]),
    "huge": (put(KEY, torch.zeros(4096, 4096, dtype=torch.int32)), [KEY, "shape [4096, 4096]"]),
    "none": (put(KEY, torch.zeros(0, 2, dtype=torch.int32)), [KEY, "shape [0, 2]"]),
    "dtype": (put(KEY, lambda t: t[KEY].long()), [KEY, "got I64"]),
    "floats": (put(KEY, torch.full((32, 2), torch.nan)), [KEY, "got F32"]),
    "no layer": (put("encoder.layer.9.mask_bits", torch.zeros(1, 1, dtype=torch.int32)), ["mask of no nn.Linear"]),
    "no Linear": (put("embeddings.LayerNorm.mask_bits", torch.zeros(1, 1, dtype=torch.int32)), ["mask of no nn.Linear"]),
    "the model": (put(".mask_bits", torch.zeros(1, 1, dtype=torch.int32)), ["mask of no nn.Linear"]),
    "other weights": (put(f"{NAME}.weight", torch.ones(32, 64)), [KEY, "removes weights that are not 0"]),
    "weights that are NaN": (put(f"{NAME}.weight", torch.full((32, 64), torch.nan)), ["removes weights that are not 0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_masks_that_fit_no_layer(sparse, case, tmp_path):
    change, words = CASES[case]
    folder = Path(shutil.copytree(sparse("masks"), tmp_path / "model"))
    weights(folder, change)
    refused(folder, *words)


def test_masks_that_are_too_large_are_not_read(sparse, tmp_path, monkeypatch):
    """The header alone says it: no tensor of that size is made."""
    import safetensors

    from pycse.sparse.storage import saved_masks
    from pycse.training.encoder import load_encoder

    folder = Path(shutil.copytree(sparse("masks"), tmp_path / "model"))
    weights(folder, put(KEY, torch.zeros(4096, 4096, dtype=torch.int32)))
    dense = load_encoder(str(Path(sparse("masks")).parent / "dense"), "cpu")[0].auto_model

    class Tensors:
        def __init__(self, real):
            self.real = real

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def __getattr__(self, name):
            return getattr(self.real, name)

        def get_tensor(self, name):
            tensor = self.real.get_tensor(name)
            assert tensor.numel() < 4096
            return tensor

    opened = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *given, **more: Tensors(opened(*given, **more)))
    with pytest.raises(ValueError, match=r"shape \[4096, 4096\]"):
        saved_masks(folder, dense)


@pytest.mark.parametrize("settings", ["2:4", 5, [1], {"pattern": "magic"}, {"pattern": None}, {"pattern": [1]}])
def test_patterns_that_are_none(sparse, settings, tmp_path):
    folder = Path(shutil.copytree(sparse("masks"), tmp_path / "model"))
    edit(folder, "config.json", pycse_sparse=settings)
    refused(folder, "pycse_sparse must have a pattern")


HEADS = [[0]] * 4
SIZES = {
    "too many heads": ("heads", "shrunk_heads", [[0, 1, 2], *HEADS[1:]]),
    "a head beyond": ("heads", "shrunk_heads", [[7], *HEADS[1:]]),
    "a head below": ("heads", "shrunk_heads", [[-1], *HEADS[1:]]),
    "a head twice": ("heads", "shrunk_heads", [[0, 0], *HEADS[1:]]),
    "a text": ("heads", "shrunk_heads", [["0"], *HEADS[1:]]),
    "a number": ("heads", "shrunk_heads", [1, 1, 1, 1]),
    "too few layers": ("heads", "shrunk_heads", HEADS[1:]),
    "no heads": ("heads", "shrunk_heads", [[], *HEADS[1:]]),
    "an object": ("heads", "shrunk_heads", {"0": [0]}),
    "huge": ("neurons", "shrunk_neurons", [10**12, 8, 8, 8]),
    "negative": ("neurons", "shrunk_neurons", [-8, 8, 8, 8]),
    "a truth": ("neurons", "shrunk_neurons", [True, 8, 8, 8]),
    "a fraction": ("neurons", "shrunk_neurons", [8.5, 8, 8, 8]),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_fit_no_layer(sparse, case, tmp_path):
    kind, name, value = SIZES[case]
    folder = Path(shutil.copytree(sparse(kind), tmp_path / "model"))
    edit(folder, "config.json", **{name: value})
    refused(folder, f"{name} in the configuration must")


def test_sizes_of_other_weights(sparse, tmp_path):
    """Allowed by themselves, but not the tensors'."""
    from pycse.training.encoder import load_encoder

    folder = Path(shutil.copytree(sparse("neurons"), tmp_path / "model"))
    kept = json.loads((folder / "config.json").read_text())["shrunk_neurons"]
    edit(folder, "config.json", shrunk_neurons=[kept[0] + 1, *kept[1:]])
    with pytest.raises(UserError, match=r"do not match the model: encoder\.layer\.0\..* instead of"):
        load_encoder(str(folder), "cpu")


UNLOADED = {
    "module": (lambda t: {f"module.{k}": v for k, v in t.items()}, ["missing and would be random", "save them without 'module.'"]),
    "layer": (lambda t: {k: v for k, v in t.items() if "layer.2." not in k}, ["layer.2.", "missing and would be random"]),
    "size": (lambda t: {k: v[:, :16] if "layer.0.attention.self.query.weight" in k else v for k, v in t.items()}, ["query.weight (32, 16) instead of (32, 32)"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "masks", "neurons"])
@pytest.mark.parametrize("case", UNLOADED)
def test_weights_that_a_loader_would_make_up(sparse, kind, case, tmp_path):
    """Of SentenceTransformers, and of a model of transformers alone."""
    change, words = UNLOADED[case]
    source = Path(sparse("masks")).parent / "dense" if kind == "dense" else sparse(kind)
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    weights(folder, change)
    refused(folder, *words)


@pytest.mark.parametrize("kind", ["dense", "masks"])
def test_a_pooler_that_is_not_used_may_be_missing(sparse, kind, tmp_path):
    from pycse.sparse import load

    source = Path(sparse("masks")).parent / kind if kind == "dense" else sparse(kind)
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    weights(folder, lambda tensors: {k: v for k, v in tensors.items() if "pooler" not in k})
    whole, cut = (model if kind == "dense" else model[0].auto_model for model in (load(source), load(folder)))
    ids = torch.tensor([[2, 6, 7, 3]], dtype=torch.int64)
    assert torch.equal(whole(ids).last_hidden_state, cut(ids).last_hidden_state)


@pytest.mark.parametrize("kind", ["masks", "heads", "neurons"])
def test_what_was_saved_is_read(sparse, kind):
    from pycse.sparse import load
    from pycse.training.encoder import load_encoder

    texts = ["a b c", "d"]
    assert (load(sparse(kind)).encode(texts) == load_encoder(str(sparse(kind)), "cpu").encode(texts)).all()


@pytest.mark.parametrize("named", [[5], "BertModel", {"a": 1}, []])
def test_architectures_that_are_none(sparse, named, tmp_path):
    """Of a folder of transformers, whose class is named in its configuration."""
    from pycse.sparse import load

    folder = Path(shutil.copytree(Path(sparse("masks")).parent / "dense", tmp_path / "model"))
    edit(folder, "config.json", architectures=named)
    try:
        assert type(load(folder)).__name__ == "BertModel"
    except (ValueError, TypeError) as error:  # transformers' own opinion of such a configuration
        assert "architectures" in str(error)
