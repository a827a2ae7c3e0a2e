"""Sentence encoders with random weights, small enough to train in a test."""

from __future__ import annotations

import pytest
import torch

from pycse.training import errors
from pycse.training.errors import UserError

try:
    errors.require_extras()
    missing = ""
except UserError as error:
    missing = str(error)
needs_extras = pytest.mark.skipif(bool(missing), reason=missing or "extras are there")


def make_model(tmp_path_factory, letters, seed, **sizes):
    """Folder of a BERT of 4 small layers with random weights, which knows single letters."""
    errors.require_extras()
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64} | sizes
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    model = tmp_path_factory.mktemp("tiny-model")
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(model))
    return str(model)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_model(tmp_path_factory, "abcdefghijklmnopqrstuvwxyz0123456789.,", seed=0, hidden_size=32)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory):
    """Another width, another tokenizer, other weights."""
    return make_model(tmp_path_factory, "zyxwvutsrqponmlkjihgfedcba", seed=1, hidden_size=48)
