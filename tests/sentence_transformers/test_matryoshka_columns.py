"""Losses of columns at several lengths, beside MatryoshkaLoss and pycse's functions."""

from __future__ import annotations

import json

import pytest
import torch
from columns_of_texts import ANCHORS, NEGATIVES, POSITIVES, assert_same, features, gradients, needs_extras

from pycse import fused_distillcse, fused_focal_infonce, fused_infonce, fused_supcon

pytestmark = [needs_extras, pytest.mark.filterwarnings("ignore")]
st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")

DIMS, WEIGHTS = [32, 8, 16], [1.0, 0.5, 2.0]


def theirs(model, weights=None, **options):
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    return MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, **options), DIMS, weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
        {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("columns", [2, 3, 4])
def test_infonce_is_matryoshka_of_multiple_negatives_ranking(model, columns, weights, options):
    from pycse.sentence_transformers import MatryoshkaInfoNCELoss

    ours = MatryoshkaInfoNCELoss(model, DIMS, dim_weights=weights, deduplicate=False, **options)
    given = [ANCHORS, POSITIVES, NEGATIVES, NEGATIVES[::-1]][:columns]
    assert_same(model, ours, theirs(model, weights, **options), given)


CACHED = [
    ("InfoNCELoss", 2, {}),
    ("InfoNCELoss", 3, {"dim_weights": WEIGHTS, "temperature": [0.05, 0.1, 0.2]}),
    ("FocalInfoNCELoss", 3, {"dim_weights": WEIGHTS}),
    ("DistillCSELoss", 2, {"dim_weights": WEIGHTS, "seed": 1}),
]


@pytest.mark.parametrize("name, columns, options", CACHED, ids=str)
def test_cached_losses_have_the_gradients_of_uncached_ones(model, wide_model, name, columns, options):
    import pycse.sentence_transformers as ours

    given = [ANCHORS, POSITIVES, NEGATIVES][:columns]
    labels = None
    if name == "DistillCSELoss":
        labels = st.SentenceTransformer(wide_model, device="cpu").encode(ANCHORS, convert_to_tensor=True).clone()
    cached = getattr(ours, f"Cached{name}")(model, dims=DIMS, mini_batch_size=3, **options)
    assert_same(model, cached, getattr(ours, name)(model, dims=DIMS, **options), given, labels)


@pytest.mark.parametrize("name", ["InfoNCELoss", "CachedInfoNCELoss", "SupConLoss"])
def test_a_trained_temperature_for_each_length(model, name):
    import pycse.sentence_transformers as ours

    temperature = torch.nn.Parameter(torch.tensor([0.05, 0.1, 0.2]))
    loss = getattr(ours, name)(model, temperature, dims=DIMS)
    labels = torch.arange(8) % 3 if name == "SupConLoss" else None
    value, _ = gradients(model, loss, [ANCHORS, POSITIVES], labels)
    z = [model.encode(column, convert_to_tensor=True).clone() for column in (ANCHORS, POSITIVES)]
    own = temperature.detach().clone().requires_grad_()
    if name == "SupConLoss":
        expected = fused_supcon(torch.cat(z), labels.repeat(2), temperature=own, dims=DIMS)
    else:
        expected = fused_infonce(*z, own, dims=DIMS)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(temperature.grad, own.grad)
    assert json.dumps(loss.get_config_dict()["temperature"])


def test_other_losses_are_pycse(model, wide_model):
    import pycse.sentence_transformers as ours

    z = [model.encode(column, convert_to_tensor=True).clone() for column in (ANCHORS, POSITIVES)]
    other = st.SentenceTransformer(wide_model, device="cpu")
    e = [other.encode(column, convert_to_tensor=True).clone() for column in (ANCHORS, POSITIVES)]
    lengths = {"dims": DIMS, "dim_weights": WEIGHTS}
    classes = torch.arange(8) % 3
    teaching = {"shuffle": "none", "distill_weight": 0.5, "m": 0.3}
    both = torch.cat(z)
    for loss, labels, expected in (
        (ours.FocalInfoNCELoss(model, 0.1, 0.4, **lengths), None, fused_focal_infonce(*z, 0.1, 0.4, **lengths)),
        (ours.GuidedInfoNCELoss(model, other, **lengths), None, fused_infonce(*z, guides=[e], **lengths)),
        (ours.SupConLoss(model, **lengths), classes, fused_supcon(both, classes.repeat(2), **lengths)),
        (ours.DistillCSELoss(model, **teaching, **lengths), e[0], fused_distillcse(*z, [e[0]], **teaching, **lengths)),
    ):
        value = loss(features(model, ANCHORS, POSITIVES), labels)
        torch.testing.assert_close(value, getattr(expected, "loss", expected))
    assert loss.latest.contrastive.shape == loss.latest.distillation.shape == ()


def kinds(ours, model, guide):
    return {
        "matryoshka": lambda **o: ours.MatryoshkaInfoNCELoss(model, **{"dims": DIMS} | o),
        "infonce": lambda **o: ours.InfoNCELoss(model, **o),
        "focal": lambda **o: ours.FocalInfoNCELoss(model, **o),
        "guided": lambda **o: ours.GuidedInfoNCELoss(model, guide, **o),
        "cached": lambda **o: ours.CachedInfoNCELoss(model, **o),
        "distillation": lambda **o: ours.DistillCSELoss(model, **o),
        "cached distillation": lambda **o: ours.CachedDistillCSELoss(model, **o),
        "supcon": lambda **o: ours.SupConLoss(model, **o),
    }


BAD = [
    ({"dims": [16, 64]}, ValueError, r"dims must lie in \[1, 32\] \(the model's embeddings\), got 64"),
    ({"dims": [0, 8]}, ValueError, "dims must be >= 1, got 0"),
    ({"dims": 8}, TypeError, "dims must be a list of lengths, got 8"),
    ({"dims": [8, 8]}, ValueError, "dims must hold each length once"),
    ({"dims": [8, 16], "dim_weights": [1.0]}, ValueError, "dim_weights must"),
    ({"dims": [8, 16], "n_dims_per_step": 3}, ValueError, r"n_dims_per_step must lie in \[1, 2\]"),
    ({"dims": [8, 16], "temperature": [0.1]}, ValueError, "temperature must be one number, or one for each of the 2"),
    ({"dims": None, "dim_weights": [1.0]}, (TypeError, ValueError), "dim"),
    ({"dims": None, "n_dims_per_step": 1}, (TypeError, ValueError), "dim"),
    ({"dims": [8], "parts": True}, TypeError, "parts"),
]


@pytest.mark.parametrize("options, error, message", BAD, ids=[str(o) for o, _, _ in BAD])
def test_wrong_lengths_are_refused_at_once(model, wide_model, options, error, message):
    import pycse.sentence_transformers as ours

    for name, make in kinds(ours, model, st.SentenceTransformer(wide_model, device="cpu")).items():
        with pytest.raises(error, match=message):
            make(**options)
            pytest.fail(name)


def test_lengths_of_a_step(model, wide_model):
    """Drawn while the loss is trained, described, and all of them in an evaluation."""
    import pycse.sentence_transformers as ours

    z = [model.encode(column, convert_to_tensor=True).clone() for column in (ANCHORS, POSITIVES)]
    each = {d: fused_infonce(z[0][:, :d], z[1][:, :d]) for d in DIMS}
    for cls in (ours.InfoNCELoss, ours.CachedInfoNCELoss):
        loss = cls(model, dims=DIMS, dim_weights=WEIGHTS, n_dims_per_step=1)
        weighted = {d: w * each[d] for d, w in zip(DIMS, WEIGHTS)}
        seen = set()
        for _ in range(12):
            loss.train()
            loss.model.eval()
            value = loss(features(model, ANCHORS, POSITIVES)).detach()
            seen |= {d for d, one in weighted.items() if torch.isclose(value, one, rtol=1e-4)}
            assert any(torch.isclose(value, one, rtol=1e-4) for one in weighted.values())
        assert seen == set(DIMS)
        with torch.no_grad():
            value = loss(features(model, ANCHORS, POSITIVES))
        torch.testing.assert_close(value, sum(weighted.values()), rtol=1e-4, atol=1e-5)


def test_a_description_makes_the_loss_again(model, wide_model):
    import pycse.sentence_transformers as ours

    given = {"dims": DIMS, "dim_weights": WEIGHTS, "n_dims_per_step": 2}
    for name, make in kinds(ours, model, st.SentenceTransformer(wide_model, device="cpu")).items():
        config = json.loads(json.dumps(make(**given).get_config_dict()))
        assert {key: config[key] for key in given} == given, name
        config.pop("teachers", None), config.pop("guide", None)
        assert json.loads(json.dumps(make(**config).get_config_dict())).items() >= config.items(), name
        assert "dims" not in make().get_config_dict() or name == "matryoshka"
    assert "Matryoshka Representation Learning" in ours.MatryoshkaInfoNCELoss(model, DIMS).citation
