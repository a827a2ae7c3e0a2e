"""Columns of texts, small models for them, and what two losses of them are compared by."""

from __future__ import annotations

import pytest
import torch
from tiny_models import missing, needs_extras, tiny_model, wide_model  # noqa: F401

if not missing:
    import sentence_transformers as st

ANCHORS = ["a cat", "two dogs", "rain falls", "he ran", "it is late", "a red car", "seven", "snow"]
POSITIVES = ["the cat", "dogs, two", "it rains", "he was running", "late it is", "the car is red", "7", "white"]
NEGATIVES = ["a dog", "one cat", "the sun", "he sat", "it is early", "a blue bus", "eight", "sand"]


@pytest.fixture
def model(tiny_model):  # noqa: F811
    return st.SentenceTransformer(tiny_model, device="cpu").eval()  # without dropout values can be compared


@pytest.fixture
def static(tiny_model):  # noqa: F811
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(3)
    tokenizer = st.SentenceTransformer(tiny_model, device="cpu").tokenizer.backend_tokenizer
    return st.SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


def features(model, *columns):
    return [dict(model.preprocess(list(column))) for column in columns]


def gradients(model, loss, columns, labels=None):
    model.zero_grad()
    value = loss(features(model, *columns), labels)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, ours, theirs, columns, labels=None, rtol=2e-4):
    (a, da), (b, db) = gradients(model, ours, columns, labels), gradients(model, theirs, columns, labels)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert da.keys() == db.keys()
    whole = torch.cat([g.flatten() for g in db.values()]).norm()
    for name, g in da.items():
        assert (g - db[name]).norm() <= rtol * whole, name
