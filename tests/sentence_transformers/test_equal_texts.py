"""Which texts of a batch are equal."""

from __future__ import annotations

import pytest
import torch
from columns_of_texts import features, needs_extras

from pycse import fused_infonce

pytestmark = [needs_extras, pytest.mark.filterwarnings("ignore")]
st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")


def test_equal_texts_are_no_negatives(model):
    from pycse.sentence_transformers import InfoNCELoss

    anchors = ["a cat", "two dogs", "a cat", "snow", "rain"]
    positives = ["the cat", "dogs", "cats", "white", "two dogs"]  # rows 0 and 2: one anchor; rows 1 and 4: one text
    negatives = ["cats", "sand", "sun", "a cat", "sun"]
    z = [model.encode(column, convert_to_tensor=True).clone() for column in (anchors, positives, negatives)]
    ids = torch.tensor([0, 1, 0, 2, 1])
    key_ids = torch.cat([ids, torch.tensor([0, 10, 11, 0, 11])])
    expected = fused_infonce(z[0], torch.cat(z[1:]), query_ids=ids, key_ids=key_ids)
    columns = features(model, anchors, positives, negatives)
    torch.testing.assert_close(InfoNCELoss(model)(columns), expected)
    plain = InfoNCELoss(model, deduplicate=False)(features(model, anchors, positives, negatives))
    torch.testing.assert_close(plain, fused_infonce(z[0], torch.cat(z[1:])))


def test_padding_does_not_make_texts_differ(model, static):
    from pycse.sentence_transformers.texts import hashes, ids_of

    short, long = features(model, ["a cat", "snow"], ["a cat", "snow and a lot of rain falls"])
    assert torch.equal(hashes(short)[0], hashes(long)[0]) and hashes(short)[1] != hashes(long)[1]
    tensors = {name: value for name, value in long.items() if isinstance(value, torch.Tensor)}
    backwards = {name: value.flip(1) for name, value in tensors.items()}
    assert (hashes(backwards) != hashes(long)).all()
    moved = {name: torch.nn.functional.pad(value, (3, 0)) for name, value in tensors.items()}  # padded on the left
    assert torch.equal(hashes(moved), hashes(long))

    one, two = features(static, ["a cat", "snow", "a cat"], ["snow", "rain", "tac a"])
    assert torch.equal(hashes(one)[1], hashes(two)[0]) and hashes(one)[0] == hashes(one)[2] != hashes(two)[2]
    assert len({*hashes(one).tolist(), *hashes(two).tolist()}) == 4
    assert ids_of([hashes(one)[:2], hashes(two)[1:]]) is None
    queries, keys = ids_of([hashes(one), hashes(two)])  # a chain: a cat - snow - rain, a cat - tac a
    assert len({*queries.tolist(), *keys.tolist()}) == 1
    queries, keys = ids_of([hashes(one), hashes(one)])
    assert torch.equal(queries, keys) and queries[0] == queries[2] != queries[1]


def test_many_texts_have_many_hashes():
    from pycse.sentence_transformers.texts import hashes

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30, (200000, 6), generator=g)
    distinct = torch.unique(ids, dim=0).shape[0]
    assert torch.unique(hashes({"input_ids": ids, "attention_mask": torch.ones_like(ids)})).shape[0] == distinct


def test_images_beside_tokens_are_not_compared_by_tokens():
    from pycse.sentence_transformers.texts import hashes

    ids = torch.ones(4, 6, dtype=torch.long)
    assert hashes({"input_ids": ids}) is not None
    assert hashes({"input_ids": ids, "pixel_values": torch.randn(4, 3, 2, 2)}) is None


def test_texts_behind_one_another(model):
    """Flattened batches, as unpadded attention takes them, know the texts that padded ones know."""
    from pycse.sentence_transformers.texts import hashes

    (padded,) = features(model, ["a cat", "two dogs ran", "a cat"])
    mask = padded["attention_mask"].bool()
    flat = {
        "input_ids": padded["input_ids"][mask][None],
        "cu_seq_lens_q": torch.cat([torch.zeros(1).long(), mask.sum(1).cumsum(0)]).int(),
    }
    found, known = hashes(flat), hashes(padded)
    assert found.shape == (3,) and found[0] == found[2] != found[1] and known[0] == known[2] != known[1]
