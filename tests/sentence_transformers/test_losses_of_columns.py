"""pycse.sentence_transformers beside sentence-transformers' own losses, and through its trainer."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from tiny_models import make_model, needs_extras, tiny_model, wide_model  # noqa: F401

from pycse import fused_distillcse, fused_focal_infonce, fused_infonce, fused_supcon

pytestmark = [needs_extras, pytest.mark.filterwarnings("ignore")]
st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")

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
def test_guided_is_the_anchor_positive_part_of_gist(model, wide_model, columns, strategy, margin):  # noqa: F811
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    from pycse.sentence_transformers import GuidedInfoNCELoss

    guide = st.SentenceTransformer(wide_model, device="cpu")
    options = {"temperature": 0.05, "margin": margin, "margin_strategy": strategy}
    theirs = GISTEmbedLoss(model, guide, contrast_anchors=False, contrast_positives=False, **options)
    ours = GuidedInfoNCELoss(model, guide, deduplicate=False, **options)
    assert_same(model, ours, theirs, [ANCHORS, POSITIVES, NEGATIVES][:columns])
    assert "guide" not in dict(ours.named_modules()) and not any(p.requires_grad for p in guide.parameters())


def test_focal_supcon_and_distillation_are_pycse(model, wide_model):  # noqa: F811
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


# --- equal texts ---


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


# --- wrappers ---


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


# --- batches beyond memory ---


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


def test_cached_distillation(model, wide_model):  # noqa: F811
    from pycse.sentence_transformers import CachedDistillCSELoss, DistillCSELoss

    teacher = st.SentenceTransformer(wide_model, device="cpu")
    e = teacher.encode(ANCHORS, convert_to_tensor=True).clone()
    cached = CachedDistillCSELoss(model, seed=1, mini_batch_size=3)
    assert_same(model, cached, DistillCSELoss(model, seed=1), [ANCHORS, POSITIVES], e)


# --- the trainer ---


def train(model, loss, tmp_path, columns, steps=4, collator=None, callbacks=(), resume=False, **arguments):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        use_cpu=True, report_to="none", disable_tqdm=True, **{"save_strategy": "no", **arguments},
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict(columns), loss=loss, data_collator=collator,
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


PAIRS = {"anchor": ANCHORS, "positive": POSITIVES}


@pytest.mark.parametrize("name", ["InfoNCELoss", "FocalInfoNCELoss", "CachedInfoNCELoss", "CachedFocalInfoNCELoss"])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_training(tiny_model, name, columns, tmp_path):  # noqa: F811
    import pycse.sentence_transformers as ours

    model = st.SentenceTransformer(tiny_model, device="cpu")
    loss = getattr(ours, name)(model)
    assert [n for n, child in loss.named_children()] == ["model"]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = dict(list((PAIRS | {"negative": NEGATIVES}).items())[:columns])
    _, values = train(model, loss, tmp_path, data)
    assert len(values) == 4 and all(torch.isfinite(torch.tensor(values)))
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_training_like_sentence_transformers(tiny_model, tmp_path):  # noqa: F811
    """The same values step by step as MultipleNegativesRankingLoss, dropout and all."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from pycse.sentence_transformers import InfoNCELoss

    values = []
    for kind in (InfoNCELoss, MultipleNegativesRankingLoss):
        model = st.SentenceTransformer(tiny_model, device="cpu")
        values.append(train(model, kind(model), tmp_path, PAIRS | {"negative": NEGATIVES}, steps=6)[1])
    torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-3, atol=1e-4)


def test_training_with_teachers(tiny_model, wide_model, tmp_path):  # noqa: F811
    from pycse.sentence_transformers import DistillCSELoss, TextCollator

    model, teacher = (st.SentenceTransformer(m, device="cpu") for m in (tiny_model, wide_model))
    loss = DistillCSELoss(model, [teacher], seed=0)
    frozen = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    _, values = train(model, loss, tmp_path, PAIRS, collator=TextCollator(model.preprocess))
    assert all(torch.isfinite(torch.tensor(values))) and loss.latest is not None
    assert all(torch.equal(p, frozen[n]) for n, p in teacher.named_parameters())
    with pytest.raises(ValueError, match="data_collator=TextCollator"):
        train(model, loss, tmp_path, PAIRS)
    labels = teacher.encode(ANCHORS).tolist()
    assert len(train(model, DistillCSELoss(model), tmp_path, PAIRS | {"label": labels})[1]) == 4


def test_a_trained_temperature_is_saved_and_restored(tiny_model, tmp_path):  # noqa: F811
    from pycse.sentence_transformers import FocalInfoNCELoss, LossState

    def losses(model):
        numbers = (torch.nn.Parameter(torch.tensor(v)) for v in (0.1, 0.3))
        return FocalInfoNCELoss(model, *numbers)

    model = st.SentenceTransformer(tiny_model, device="cpu")
    loss = losses(model)
    trainer, _ = train(
        model, loss, tmp_path, PAIRS, callbacks=[LossState(loss)], save_strategy="steps", save_steps=2, steps=4
    )
    assert loss.temperature.item() != pytest.approx(0.1) and loss.m.item() != pytest.approx(0.3)
    again_model = st.SentenceTransformer(tiny_model, device="cpu")
    again = losses(again_model)
    other = tmp_path / "other"  # where training goes on in another folder: the checkpoint's own numbers count
    train(
        again_model, again, other, PAIRS, callbacks=[LossState(again)], save_strategy="steps", save_steps=2, steps=4,
        resume=str(tmp_path / "checkpoint-2"),
    )  # fmt: skip
    torch.testing.assert_close(again.temperature, loss.temperature)
    torch.testing.assert_close(again.m, loss.m)
    train(model, losses(model), tmp_path / "without", PAIRS, save_strategy="steps", save_steps=2, steps=2)
    with pytest.raises(ValueError, match="the checkpoint of step 2 was saved without LossState"):
        last = str(tmp_path / "without" / "checkpoint-2")
        train(again_model, again, other, PAIRS, callbacks=[LossState(again)], steps=4, resume=last)
    with pytest.warns(UserWarning, match="temperature, m of the loss is trained"):
        losses(model).train()(features(model, ANCHORS, POSITIVES))


def test_losses_by_dataset_and_evaluation(tiny_model, tmp_path):  # noqa: F811
    from datasets import Dataset, DatasetDict
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    from pycse.sentence_transformers import FocalInfoNCELoss, SupConLoss

    model = st.SentenceTransformer(tiny_model, device="cpu")
    data = DatasetDict(
        {
            "pairs": Dataset.from_dict(PAIRS),
            "classes": Dataset.from_dict({"text": ANCHORS, "label": [0, 0, 1, 1, 2, 2, 3, 3]}),
        }
    )
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", eval_strategy="epoch", prompts="query: ",
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data,
        loss={"pairs": FocalInfoNCELoss(model), "classes": SupConLoss(model)},
    )  # fmt: skip
    trainer.train()
    found = {k: v for entry in trainer.state.log_history for k, v in entry.items() if k.endswith("_loss")}
    assert {"eval_pairs_loss", "eval_classes_loss"} <= found.keys() and all(v == v for v in found.values())
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "hou-li-2023" in card and "khosla2020supervised" in card and "FocalInfoNCELoss" in card


# --- descriptions and bad input ---


def test_descriptions_are_json(model, wide_model):  # noqa: F811
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


def test_batches_that_cannot_be_used(model, static, wide_model):  # noqa: F811
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


def test_precomputed_embeddings_are_compared_without_texts(model):
    from pycse.sentence_transformers import InfoNCELoss

    z1, z2 = torch.randn(6, 8), torch.randn(6, 8)
    torch.testing.assert_close(InfoNCELoss(model).compute_loss_from_embeddings([z1, z2], None), fused_infonce(z1, z2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InfoNCELoss(model).compute_loss_from_embeddings([z1, z2], None)


# --- what trainers do around a loss ---

AROUND = [
    {"bf16": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2},
    {"prompts": {"anchor": "query: ", "positive": "text: "}},
]  # fmt: skip


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
RUNS = [(name, around) for name in ("InfoNCELoss", "CachedFocalInfoNCELoss") for around in AROUND]


@pytest.mark.parametrize(
    "name, around", [*RUNS, ("InfoNCELoss", COMPILED)], ids=lambda x: x if isinstance(x, str) else next(iter(x))
)
def test_training_arguments(tiny_model, name, around, tmp_path):  # noqa: F811
    import pycse.sentence_transformers as ours

    torch._dynamo.reset()
    model = st.SentenceTransformer(tiny_model, device="cpu")
    loss = getattr(ours, name)(model, precision="half" if "bf16" in around else None)
    _, values = train(model, loss, tmp_path, PAIRS, steps=2, **around)
    assert len(values) == 2 and all(torch.isfinite(torch.tensor(values)))


def test_the_trainer_of_transformers(tiny_model, tmp_path):  # noqa: F811
    """docs/sentence_transformers.md: compute_loss_func. One step is the step that a loop makes."""
    from transformers import BertModel, Trainer, TrainingArguments

    from pycse import fused_infonce

    class TwoViews(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = BertModel.from_pretrained(tiny_model).eval()

        def forward(self, anchor, positive):
            return tuple(self.encoder(**column).last_hidden_state[:, 0] for column in (anchor, positive))

    tokenizer = st.SentenceTransformer(tiny_model, device="cpu").tokenizer
    rows = list(zip(ANCHORS, POSITIVES))

    def collate(batch):
        anchors, positives = zip(*batch)
        columns = (tokenizer(list(texts), padding=True, return_tensors="pt") for texts in (anchors, positives))
        return dict(zip(("anchor", "positive"), map(dict, columns)))

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return fused_infonce(*outputs, temperature=0.05)

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trained, expected = TwoViews(), TwoViews()
    trainer = Trainer(
        model=trained, args=args, train_dataset=rows, data_collator=collate, compute_loss_func=compute_loss
    )
    trained.train = lambda mode=True: trained  # without dropout steps can be compared
    trainer.train()
    compute_loss(expected(**collate(rows)), None).backward()
    with torch.no_grad():
        for p in expected.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    for (name, a), (_, b) in zip(trained.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


# --- what a review found ---


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


def test_a_seeded_shuffle_is_left_alone_by_evaluation(model):
    from pycse.sentence_transformers import DistillCSELoss, LossState

    loss = DistillCSELoss(model, seed=7)
    labels = torch.randn(8, 32)
    before = loss.generator.get_state()
    with torch.no_grad():
        loss(features(model, ANCHORS, POSITIVES), labels)
    assert torch.equal(before, loss.generator.get_state())
    loss(features(model, ANCHORS, POSITIVES), labels)
    assert not torch.equal(before, loss.generator.get_state())
    saved = json.loads(json.dumps(LossState(loss).state()))
    again = DistillCSELoss(model, seed=1)
    LossState(again)._restore({"LossState": saved}, "here")
    assert torch.equal(again.generator.get_state(), loss.generator.get_state())


def test_teachers_and_guides_read_a_batch_once(model, wide_model):  # noqa: F811
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


@pytest.mark.parametrize("columns", [2, 3])
def test_hardness_of_hard_negatives(model, columns):
    """Without any it weighs nothing, as in MultipleNegativesRankingLoss."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from pycse.sentence_transformers import InfoNCELoss

    options = {"hardness_mode": "hard_negatives", "hardness_strength": 5.0}
    given = [ANCHORS, POSITIVES, NEGATIVES][:columns]
    theirs = MultipleNegativesRankingLoss(model, **options)
    assert_same(model, InfoNCELoss(model, deduplicate=False, **options), theirs, given)


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


def test_wrong_teachers_guides_and_labels(model, wide_model):  # noqa: F811
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
