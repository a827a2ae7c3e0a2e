"""Descriptions, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from columns_of_texts import ANCHORS, POSITIVES, features, needs_extras

pytestmark = [needs_extras, pytest.mark.filterwarnings("ignore")]
st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")


def test_descriptions_are_json(model, wide_model):
    import pycse.sentence_transformers as ours

    guide = st.SentenceTransformer(wide_model, device="cpu")
    every = [
        ours.InfoNCELoss(model), ours.FocalInfoNCELoss(model, torch.nn.Parameter(torch.tensor(0.1))),
        ours.GuidedInfoNCELoss(model, guide, margin=0.1), ours.SupConLoss(model), ours.DistillCSELoss(model, [guide]),
        ours.CachedInfoNCELoss(model), ours.CachedDistillCSELoss(model),
    ]  # fmt: skip
    for loss in every:
        config = json.loads(json.dumps(loss.get_config_dict()))
        assert "temperature" in config and loss.citation.count("@") >= 1
    assert every[0].get_config_dict()["directions"] == ["query_to_doc"]
    assert every[2].get_config_dict()["margin"] == 0.1


BAD = [
    ({"temperature": -1.0}, ValueError, "temperature must be a finite number > 0"),
    ({"similarity_fct": "euclid"}, ValueError, "similarity_fct must be cos_sim or dot_score, got 'euclid'"),
    ({"precision": "mixed"}, ValueError, "precision must be one of 'full', 'half'"),
    ({"deduplicate": 1}, TypeError, "deduplicate must be True or False"),
    ({"directions": ["query_to_key"]}, ValueError, "directions must be one of"),
    ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum'"),
    ({"hardness_mode": "some", "hardness_strength": 1.0}, ValueError, "hardness_mode must be one of"),
    ({"weight": torch.ones(3)}, TypeError, "option 'weight' is none of CachedFocalInfoNCELoss"),
    ({"mini_batch_size": 0}, ValueError, "mini_batch_size must be at least 1, got 0"),
    ({"margins": 1}, TypeError, "margins"),
]


@pytest.mark.parametrize("options, error, message", BAD, ids=[next(iter(o)) for o, _, _ in BAD])
def test_wrong_options(model, options, error, message):
    from pycse.sentence_transformers import CachedFocalInfoNCELoss

    with pytest.raises(error, match=message):
        CachedFocalInfoNCELoss(model, **options)


def test_batches_that_cannot_be_used(model, static, wide_model):
    import pycse.sentence_transformers as ours

    with pytest.raises(ValueError, match="at least 1 column"):
        ours.InfoNCELoss(model)([])
    with pytest.raises(ValueError, match=r"as many rows as the first, got \[8, 7\]"):
        ours.InfoNCELoss(model)(features(model, ANCHORS, POSITIVES[:7]))
    headless = st.SentenceTransformer(modules=[model[0]], device="cpu")
    for kind in (ours.InfoNCELoss, ours.CachedInfoNCELoss):
        with pytest.raises(ValueError, match="the model gives no 'sentence_embedding'"):
            kind(headless)(features(model, ANCHORS, POSITIVES))
        with pytest.raises(ValueError, match="both views are equal"):
            kind(static.train())(features(static, ANCHORS))
        with pytest.warns(UserWarning, match="a batch of one row has no negatives"):
            kind(model)(features(model, ANCHORS[:1], POSITIVES[:1]))
    with pytest.raises(ValueError, match=r"teachers\[0\] is the model that is trained"):
        ours.DistillCSELoss(model, [model])
    with pytest.raises(ValueError, match="guide must be another model"):
        ours.GuidedInfoNCELoss(model, model)
    with pytest.raises(TypeError, match="label column of integers"):
        ours.SupConLoss(model)(features(model, ANCHORS), None)
    with pytest.raises(ValueError, match="label column with their embeddings"):
        ours.DistillCSELoss(model)(features(model, ANCHORS, POSITIVES), None)
    with pytest.raises(ValueError, match=r"teacher_widths \(3, 4\) must add up to the 8 numbers"):
        ours.DistillCSELoss(model, teacher_widths=[3, 4])(features(model, ANCHORS, POSITIVES), torch.zeros(8, 8))
    with pytest.raises(ValueError, match="mini_batch_num_tokens counts a transformer's tokens"):
        ours.CachedInfoNCELoss(static, mini_batch_num_tokens=9)(features(static, ANCHORS, POSITIVES))


WRONG = [
    (
        {"symmetric": True, "directions": ["query_to_doc", "doc_to_query"]},
        ValueError,
        "symmetric and directions exclude",
    ),
    ({"directions": "query_to_doc"}, TypeError, "directions must be a sequence of names, got 'query_to_doc'"),
    ({"temperatur": 0.1}, TypeError, "option 'temperatur' is none of InfoNCELoss"),
    ({"guide_above": 0.1}, TypeError, "option 'guide_above' is none of InfoNCELoss"),
    ({"hardness_strength": -3.0}, ValueError, "hardness_strength must be >= 0, got -3.0"),
    ({"hardness_strength": "x"}, TypeError, "hardness_strength must be a number, got 'x'"),
    ({"exclude_above": torch.ones(4)}, TypeError, "exclude_above must be a number here"),
]


@pytest.mark.parametrize("options, error, message", WRONG, ids=[next(iter(o)) for o, _, _ in WRONG])
def test_wrong_options_are_refused_at_once(model, options, error, message):
    from pycse.sentence_transformers import InfoNCELoss

    with pytest.raises(error, match=message):
        InfoNCELoss(model, **options)


def test_wrong_teachers_guides_and_labels(model, wide_model):
    import pycse.sentence_transformers as ours

    guide = st.SentenceTransformer(wide_model, device="cpu")
    with pytest.raises(
        TypeError, match=r"teachers\[0\] must be a SentenceTransformer or a function of texts, got None"
    ):
        ours.DistillCSELoss(model, [None])
    with pytest.raises(TypeError, match="teacher_widths must be a sequence of widths, got 5"):
        ours.DistillCSELoss(model, teacher_widths=5)
    with pytest.raises(ValueError, match="teacher_widths must be at least 1 each, got 0"):
        ours.DistillCSELoss(model, teacher_widths=[0, 8])
    with pytest.raises(ValueError, match="margin_strategy must be one of"):
        ours.GuidedInfoNCELoss(model, guide, margin_strategy="x")
    with pytest.raises(ValueError, match="a guide speaks of anchors and positives alone"):
        ours.GuidedInfoNCELoss(model, guide, symmetric=True)
    with pytest.raises(ValueError, match=r"labels must be one class a row, 8 of them, got shape \(7,\)"):
        ours.SupConLoss(model)(features(model, ANCHORS), torch.zeros(7).long())
