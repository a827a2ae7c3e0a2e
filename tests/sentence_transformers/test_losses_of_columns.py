"""Values and gradients beside sentence-transformers' own losses, and pycse's functions."""

from __future__ import annotations

import warnings

import pytest
import torch
from columns_of_texts import ANCHORS, NEGATIVES, POSITIVES, assert_same, features, needs_extras

from pycse import fused_distillcse, fused_focal_infonce, fused_infonce, fused_supcon

pytestmark = [needs_extras, pytest.mark.filterwarnings("ignore")]
st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")


OPTIONS = [
    {}, {"directions": ("query_to_doc", "query_to_query")}, {"directions": ("query_to_doc", "doc_to_doc")},
    {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"hardness_mode": "all_negatives", "hardness_strength": 9.0},
    {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("columns", [2, 3, 4])
def test_infonce_is_multiple_negatives_ranking(model, columns, options):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from pycse.sentence_transformers import InfoNCELoss

    given = [ANCHORS, POSITIVES, NEGATIVES, NEGATIVES[::-1]][:columns]
    ours = InfoNCELoss(model, deduplicate=False, **options)
    assert_same(model, ours, MultipleNegativesRankingLoss(model, **options), given)


def test_dot_products(model):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    from pycse.sentence_transformers import InfoNCELoss

    ours = InfoNCELoss(model, temperature=1.0, similarity_fct=dot_score)
    assert_same(
        model, ours, MultipleNegativesRankingLoss(model, scale=1.0, similarity_fct=dot_score), [ANCHORS, POSITIVES]
    )


@pytest.mark.parametrize("strategy, margin", [("absolute", 0.0), ("absolute", 0.1), ("relative", 0.05)])
@pytest.mark.parametrize("columns", [2, 3])
def test_guided_is_the_anchor_positive_part_of_gist(model, wide_model, columns, strategy, margin):
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    from pycse.sentence_transformers import GuidedInfoNCELoss

    guide = st.SentenceTransformer(wide_model, device="cpu")
    options = {"temperature": 0.05, "margin": margin, "margin_strategy": strategy}
    theirs = GISTEmbedLoss(model, guide, contrast_anchors=False, contrast_positives=False, **options)
    ours = GuidedInfoNCELoss(model, guide, deduplicate=False, **options)
    assert_same(model, ours, theirs, [ANCHORS, POSITIVES, NEGATIVES][:columns])
    assert "guide" not in dict(ours.named_modules()) and not any(p.requires_grad for p in guide.parameters())


def test_focal_supcon_and_distillation_are_pycse(model, wide_model):
    from pycse.sentence_transformers import DistillCSELoss, FocalInfoNCELoss, SupConLoss

    z = [model.encode(column, convert_to_tensor=True).clone() for column in (ANCHORS, POSITIVES, NEGATIVES)]
    columns = features(model, ANCHORS, POSITIVES, NEGATIVES)
    focal = FocalInfoNCELoss(model, temperature=0.1, m=0.4, positive_margin=0.1)(columns)
    torch.testing.assert_close(focal, fused_focal_infonce(z[0], torch.cat(z[1:]), 0.1, 0.4, positive_margin=0.1))

    labels = torch.arange(8) % 3
    supcon = SupConLoss(model, temperature=0.1, inside=True)(features(model, ANCHORS, POSITIVES), labels)
    torch.testing.assert_close(supcon, fused_supcon(torch.cat(z[:2]), labels.repeat(2), temperature=0.1, inside=True))

    teacher = st.SentenceTransformer(wide_model, device="cpu")
    e = teacher.encode(ANCHORS, convert_to_tensor=True).clone()
    expected = fused_distillcse(z[0], z[1], [e], shuffle="none", distill_weight=0.5, m=0.3).loss
    given = {"shuffle": "none", "distill_weight": 0.5, "m": 0.3}
    columns = features(model, ANCHORS, POSITIVES)
    columns[0]["texts"] = [ANCHORS, POSITIVES]
    torch.testing.assert_close(DistillCSELoss(model, [teacher], **given)(columns), expected)
    columns = features(model, ANCHORS, POSITIVES)
    torch.testing.assert_close(DistillCSELoss(model, **given)(columns, e), expected)
    two = DistillCSELoss(model, teacher_widths=[20, 28], **given)(features(model, ANCHORS, POSITIVES), e)
    torch.testing.assert_close(two, fused_distillcse(z[0], z[1], [e[:, :20], e[:, 20:]], **given).loss)


@pytest.mark.parametrize("precision", ["half", "full"])
def test_precision(model, precision):
    from pycse.sentence_transformers import InfoNCELoss

    z = [model.encode(column, convert_to_tensor=True).clone() for column in (ANCHORS, POSITIVES)]
    loss = InfoNCELoss(model, precision=precision)(features(model, ANCHORS, POSITIVES))
    dtype = torch.bfloat16 if precision == "half" else torch.float32
    torch.testing.assert_close(loss, fused_infonce(*(x.to(dtype) for x in z)))


@pytest.mark.parametrize("columns", [2, 3])
def test_hardness_of_hard_negatives(model, columns):
    """Without any it weighs nothing, as in MultipleNegativesRankingLoss."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from pycse.sentence_transformers import InfoNCELoss

    options = {"hardness_mode": "hard_negatives", "hardness_strength": 5.0}
    given = [ANCHORS, POSITIVES, NEGATIVES][:columns]
    theirs = MultipleNegativesRankingLoss(model, **options)
    assert_same(model, InfoNCELoss(model, deduplicate=False, **options), theirs, given)


def test_precomputed_embeddings_are_compared_without_texts(model):
    from pycse.sentence_transformers import InfoNCELoss

    z1, z2 = torch.randn(6, 8), torch.randn(6, 8)
    torch.testing.assert_close(InfoNCELoss(model).compute_loss_from_embeddings([z1, z2], None), fused_infonce(z1, z2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InfoNCELoss(model).compute_loss_from_embeddings([z1, z2], None)
