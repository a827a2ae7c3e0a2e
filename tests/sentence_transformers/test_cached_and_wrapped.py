"""Batches beyond memory, and losses around ours."""

from __future__ import annotations

import pytest
import torch
from columns_of_texts import ANCHORS, NEGATIVES, POSITIVES, assert_same, features, gradients, needs_extras

pytestmark = [needs_extras, pytest.mark.filterwarnings("ignore")]
st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")


@pytest.mark.parametrize("name", ["InfoNCELoss", "CachedInfoNCELoss"])
@pytest.mark.parametrize("columns", [2, 3])
def test_matryoshka(model, name, columns):
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    import pycse.sentence_transformers as ours

    given, dims = [ANCHORS, POSITIVES, NEGATIVES][:columns], [32, 16, 8]
    options = {"mini_batch_size": 3} if name.startswith("Cached") else {}
    loss = MatryoshkaLoss(model, getattr(ours, name)(model, deduplicate=False, **options), dims)
    assert_same(model, loss, MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), dims), given)


def test_views_differ_at_every_length(model):
    """One dictionary embedded twice would give equal views at the shorter lengths."""
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    from pycse.sentence_transformers import InfoNCELoss

    loss, seen = InfoNCELoss(model.train()), []
    compare = loss.compare
    loss.compare = lambda embeddings, batch: (
        seen.append([z.detach().clone() for z in embeddings]) or compare(embeddings, batch)
    )
    MatryoshkaLoss(model, loss, [32, 16, 8])(features(model, ANCHORS), None).backward()
    assert [z1.shape[1] for z1, _ in seen] == [32, 16, 8]
    assert all(not torch.equal(z1, z2) for z1, z2 in seen)


def test_adaptive_layers(model):
    from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MultipleNegativesRankingLoss

    from pycse.sentence_transformers import InfoNCELoss

    results = []
    for loss in (InfoNCELoss(model, deduplicate=False), MultipleNegativesRankingLoss(model)):
        wrapped = AdaptiveLayerLoss(model, loss, n_layers_per_step=-1)
        results.append(gradients(model, wrapped, [ANCHORS, POSITIVES])[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="one column under AdaptiveLayerLoss"):
        AdaptiveLayerLoss(model, InfoNCELoss(model))(features(model, ANCHORS), None)


@pytest.mark.parametrize("name", ["InfoNCELoss", "FocalInfoNCELoss"])
@pytest.mark.parametrize(
    "options", [{"mini_batch_size": 3}, {"mini_batch_size": 100}, {"mini_batch_num_tokens": 20}], ids=str
)
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_cached_losses_have_the_gradients_of_uncached_ones(model, name, options, columns):
    import pycse.sentence_transformers as ours

    given = [ANCHORS, POSITIVES, NEGATIVES][:columns]
    cached = getattr(ours, f"Cached{name}")(model, **options)
    assert_same(model, cached, getattr(ours, name)(model), given)
    assert cached.uses_gradient_cache


def test_random_states_are_those_of_the_first_pass(model):
    """With dropout: what the second pass embeds is what the loss saw."""
    from pycse.sentence_transformers import CachedInfoNCELoss

    loss, seen = CachedInfoNCELoss(model.train(), mini_batch_size=3), []
    embed = loss.embed_minibatch
    loss.embed_minibatch = lambda *a, **k: seen.append(embed(*a, **k)) or seen[-1]
    loss(features(model, ANCHORS), None).backward()
    half = len(seen) // 2
    for (first, _), (second, _) in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[0][0], seen[half // 2][0])  # two views


@pytest.mark.parametrize("columns", [2, 3])
def test_cached_static_embeddings(static, columns):
    from pycse.sentence_transformers import CachedInfoNCELoss, InfoNCELoss

    given = [ANCHORS, POSITIVES, NEGATIVES][:columns]
    assert_same(static, CachedInfoNCELoss(static, mini_batch_size=3), InfoNCELoss(static), given)


def test_cached_distillation(model, wide_model):
    from pycse.sentence_transformers import CachedDistillCSELoss, DistillCSELoss

    teacher = st.SentenceTransformer(wide_model, device="cpu")
    e = teacher.encode(ANCHORS, convert_to_tensor=True).clone()
    cached = CachedDistillCSELoss(model, seed=1, mini_batch_size=3)
    assert_same(model, cached, DistillCSELoss(model, seed=1), [ANCHORS, POSITIVES], e)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "matryoshka"])
def test_a_trained_number_of_a_cached_loss_waits_for_the_upstream_gradient(model, wrapped):
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    import pycse.sentence_transformers as ours

    found = []
    for name, options in (("FocalInfoNCELoss", {}), ("CachedFocalInfoNCELoss", {"mini_batch_size": 3})):
        numbers = [torch.nn.Parameter(torch.tensor(v)) for v in (0.1, 0.3)]
        loss = getattr(ours, name)(model, *numbers, **options)
        whole = MatryoshkaLoss(model, loss, [32, 16], [1.0, 0.1]) if wrapped else loss
        value = whole(features(model, ANCHORS, POSITIVES), None)
        assert all(p.grad is None for p in numbers)  # before anybody asked
        (value / 4).backward()
        found.append(torch.stack([p.grad for p in numbers]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_teachers_and_guides_read_a_batch_once(model, wide_model):
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    from pycse.sentence_transformers import DistillCSELoss, GuidedInfoNCELoss

    calls = []
    loss = DistillCSELoss(model, [lambda texts: calls.append(1) or torch.ones(len(texts), 4)])
    columns = features(model, ANCHORS, POSITIVES)
    columns[0]["texts"] = [ANCHORS, POSITIVES]
    MatryoshkaLoss(model, loss, [32, 16, 8])(columns, None)
    assert len(calls) == 1
    guide = st.SentenceTransformer(wide_model, device="cpu")
    forward, read = guide.forward, []
    guide.forward = lambda features: read.append(1) or forward(features)
    MatryoshkaLoss(model, GuidedInfoNCELoss(model, guide), [32, 16])(features(model, ANCHORS, POSITIVES), None)
    assert len(read) == 2
    with pytest.raises(ValueError, match="the labels' width changed from 32 to 16: MatryoshkaLoss cuts labels"):
        MatryoshkaLoss(model, DistillCSELoss(model), [32, 16])(features(model, ANCHORS, POSITIVES), torch.randn(8, 32))
