"""Teachers whose embeddings stay on disk, alone and in the trainer."""

from __future__ import annotations

import pytest
import torch
from columns_of_texts import ANCHORS, POSITIVES, needs_extras

pytestmark = [needs_extras, pytest.mark.filterwarnings("ignore")]
st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")


@pytest.fixture
def load(tiny_model):
    return lambda name=tiny_model: st.SentenceTransformer(name, device="cpu")


def test_cached_sentences_are_not_embedded_again(load, tmp_path):
    from pycse.sentence_transformers import CachedTeacher

    plain, teacher = load(), CachedTeacher(load(), tmp_path)
    first = teacher(ANCHORS[:4])
    encode = teacher.encoder.encode
    seen = []
    teacher.encoder.encode = lambda texts, **options: seen.append(list(texts)) or encode(texts, **options)
    batch = [*ANCHORS[2:6], ANCHORS[2], ANCHORS[5]]
    z = teacher(batch)
    assert seen == [ANCHORS[4:6]]
    assert torch.equal(z[:2], first[2:]) and torch.equal(z[4], z[0]) and torch.equal(z[5], z[3])
    assert torch.allclose(z, torch.from_numpy(plain.encode(batch)), atol=1e-6) and not z.requires_grad
    again = CachedTeacher(load(), tmp_path)
    again.encoder.encode = None  # would fail
    assert torch.equal(again(batch), z) and again.found == 6 and again.embedded == 0


def test_anything_that_changes_embeddings_changes_the_key(load, wide_model):
    from pycse.sentence_transformers.cached_teacher import fingerprint
    from pycse.training.encoder import keep_layers

    def spoiled(change):
        encoder = load()
        change(encoder)
        return fingerprint(encoder)

    def weight(encoder):
        with torch.no_grad():
            next(encoder.parameters()).view(-1)[7].add_(1e-6)

    changes = {
        "nothing": lambda encoder: None,
        "weight": weight,
        "layers": lambda encoder: keep_layers(encoder, [0, 1, 2]),
        "length": lambda encoder: setattr(encoder, "max_seq_length", 16),
        "prompt": lambda encoder: setattr(encoder, "prompts", {"query": "q: "}),
        "dtype": lambda encoder: encoder.double(),
        "pooling": lambda encoder: setattr(encoder[1], "pooling_mode", "cls"),
    }
    keys = {name: spoiled(change) for name, change in changes.items()}
    used = load()
    used.encode(ANCHORS)
    assert keys["nothing"] == fingerprint(used)
    assert len({*keys.values(), fingerprint(load(wide_model))}) == len(keys) + 1


def test_what_another_process_appended_is_found(load, tmp_path):
    from pycse.sentence_transformers import CachedTeacher

    one, two = CachedTeacher(load(), tmp_path), CachedTeacher(load(), tmp_path)
    z = one(ANCHORS)
    assert torch.equal(two(ANCHORS), z)
    assert (one.embedded, one.found) == (len(ANCHORS), 0) and (two.embedded, two.found) == (0, len(ANCHORS))
    assert one.path == two.path and one.width == z.shape[1]


def test_training_with_a_cached_teacher(tiny_model, wide_model, load, tmp_path):
    """The trainer learns from the file what it learns from the encoder; a second run reads the file alone."""
    from test_trainer import train

    from pycse.sentence_transformers import CachedDistillCSELoss, CachedTeacher, DistillCSELoss, TextCollator

    pairs = {"anchor": ANCHORS, "positive": POSITIVES}

    def losses(kind, teacher):
        model = load()
        return train(model, kind(model, [teacher], seed=0), tmp_path, pairs, collator=TextCollator(model.preprocess))[1]

    for kind in (DistillCSELoss, CachedDistillCSELoss):
        folder = tmp_path / kind.__name__
        first, again = CachedTeacher(load(wide_model), folder), CachedTeacher(load(wide_model), folder)
        made, found = losses(kind, first), losses(kind, again)
        assert made == found and (first.embedded, again.embedded, again.found) == (len(ANCHORS), 0, 2 * len(ANCHORS))
        torch.testing.assert_close(*map(torch.tensor, (made, losses(kind, load(wide_model)))), rtol=1e-4, atol=1e-5)


def test_a_folder_of_no_use(load, tmp_path):
    from pycse.sentence_transformers import CachedTeacher

    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot write .*give another folder"):
        CachedTeacher(load(), tmp_path / "file")
