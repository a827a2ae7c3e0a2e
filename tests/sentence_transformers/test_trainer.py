"""Losses in sentence-transformers' real trainer, and in transformers'."""

from __future__ import annotations

import json

import pytest
import torch
from columns_of_texts import ANCHORS, NEGATIVES, POSITIVES, features, needs_extras
from two_views import PAIRS as PAIRS_OF_TEXTS
from two_views import RATE, Collator, TwoViews, assert_same_weights, step_of_a_loop, step_of_transformers

pytestmark = [needs_extras, pytest.mark.filterwarnings("ignore")]
st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")


def train(model, loss, tmp_path, columns, steps=4, collator=None, callbacks=(), resume=False, **arguments):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, **{"learning_rate": 1e-3, "save_strategy": "no", **arguments},
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
def test_training(tiny_model, name, columns, tmp_path):
    import pycse.sentence_transformers as ours

    model = st.SentenceTransformer(tiny_model, device="cpu")
    loss = getattr(ours, name)(model)
    assert [n for n, child in loss.named_children()] == ["model"]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = dict(list((PAIRS | {"negative": NEGATIVES}).items())[:columns])
    _, values = train(model, loss, tmp_path, data)
    assert len(values) == 4 and all(torch.isfinite(torch.tensor(values)))
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_training_like_sentence_transformers(tiny_model, tmp_path):
    """The same values step by step as MultipleNegativesRankingLoss, dropout and all."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from pycse.sentence_transformers import InfoNCELoss

    values = []
    for kind in (InfoNCELoss, MultipleNegativesRankingLoss):
        model = st.SentenceTransformer(tiny_model, device="cpu")
        values.append(train(model, kind(model), tmp_path, PAIRS | {"negative": NEGATIVES}, steps=6)[1])
    torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["add_adapter", "get_peft_model"])
def test_an_adapter_is_trained_alone(tiny_model, way, tmp_path):
    """LoRA: the values of MultipleNegativesRankingLoss step by step, and the model's own weights stay."""
    peft = pytest.importorskip("peft", reason="needs peft")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.import_utils import is_peft_greater_or_equal

    from pycse.sentence_transformers import InfoNCELoss

    if way == "add_adapter" and not is_peft_greater_or_equal(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers' add_adapter needs peft >= {MIN_PEFT_VERSION}, found {peft.__version__}")
    values = []
    for kind in (InfoNCELoss, MultipleNegativesRankingLoss):
        model = st.SentenceTransformer(tiny_model, device="cpu")
        config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
        torch.manual_seed(0)
        if way == "add_adapter":
            model.add_adapter(config)
        else:
            model[0].auto_model = peft.get_peft_model(model[0].auto_model, config)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        values.append(train(model, kind(model), tmp_path, PAIRS, learning_rate=0.05)[1])
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in before if "lora_" in n}
        assert len(changed) == 16  # A and B of two matrices in four layers
    torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-3, atol=1e-4)


def test_training_with_teachers(tiny_model, wide_model, tmp_path):
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


def test_a_trained_temperature_is_saved_and_restored(tiny_model, tmp_path):
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


def test_losses_by_dataset_and_evaluation(tiny_model, tmp_path):
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


AROUND = [
    {"bf16": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2},
    {"prompts": {"anchor": "query: ", "positive": "text: "}},
]  # fmt: skip


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
RUNS = [(name, around) for name in ("InfoNCELoss", "CachedFocalInfoNCELoss") for around in AROUND]


@pytest.mark.parametrize(
    "name, around", [*RUNS, ("InfoNCELoss", COMPILED)], ids=lambda x: x if isinstance(x, str) else next(iter(x))
)
def test_training_arguments(tiny_model, name, around, tmp_path, monkeypatch):
    import pycse.sentence_transformers as ours

    monkeypatch.setenv(
        "ACCELERATE_DYNAMO_BACKEND", "no"
    )  # torch_compile sets it, for whatever comes after in the process
    torch._dynamo.reset()
    model = st.SentenceTransformer(tiny_model, device="cpu")
    loss = getattr(ours, name)(model, precision="half" if "bf16" in around else None)
    _, values = train(model, loss, tmp_path, PAIRS, steps=2, **around)
    assert len(values) == 2 and all(torch.isfinite(torch.tensor(values)))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainer_of_transformers(tiny_model, tmp_path, accumulated, labels):
    """docs/sentence_transformers.md: compute_loss_func. One step is the step that a loop makes."""
    rows = {"per_device_train_batch_size": 8 // accumulated, "average_tokens_across_devices": False}
    trained, batches = step_of_transformers(tiny_model, tmp_path, labels, accumulated, **rows)
    assert len(batches) == accumulated
    assert_same_weights(trained, step_of_a_loop(tiny_model, batches))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loop_of_accelerate(tiny_model, accumulated):
    """docs/sentence_transformers.md: one step of it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from pycse import fused_infonce

    AcceleratorState._reset_state(reset_partial_state=True)  # what a trainer before has set
    accelerator, collate = Accelerator(cpu=True, gradient_accumulation_steps=accumulated), Collator(tiny_model)
    trained = TwoViews(tiny_model)
    model, optimizer, loader = accelerator.prepare(
        trained, torch.optim.SGD(trained.parameters(), lr=RATE),
        torch.utils.data.DataLoader(PAIRS_OF_TEXTS, 8 // accumulated, collate_fn=collate),
    )  # fmt: skip
    for batch in loader:
        with accelerator.accumulate(model):
            loss = fused_infonce(*model(**batch), temperature=0.05)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(trained, step_of_a_loop(tiny_model, collate.batches))


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
