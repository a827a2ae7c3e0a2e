"""A model of transformers that returns both views, as its trainer and accelerate's loops take it, and one step of it."""

from __future__ import annotations

import torch
from columns_of_texts import ANCHORS, POSITIVES

from pycse import fused_infonce

PAIRS = list(zip(ANCHORS, POSITIVES))
RATE = 0.1


class TwoViews(torch.nn.Module):
    def __init__(self, tiny_model):
        from transformers import BertModel

        super().__init__()
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # so that steps can be compared
        self.encoder = BertModel.from_pretrained(tiny_model, add_pooling_layer=False, **still)

    def forward(self, anchor, positive):
        return tuple(self.encoder(**column).last_hidden_state[:, 0] for column in (anchor, positive))


class Collator:
    """Tokens of both columns, with a batch's row numbers under ``labels`` if asked; ``batches`` are those it has made."""

    def __init__(self, tiny_model, labels=False):
        from transformers import AutoTokenizer

        self.tokenizer, self.labels, self.batches = AutoTokenizer.from_pretrained(tiny_model), labels, []

    def __call__(self, pairs):
        pairs = list(map(tuple, pairs))
        self.batches.append(pairs)
        columns = (self.tokenizer(list(texts), padding=True, return_tensors="pt") for texts in zip(*pairs))
        batch = dict(zip(("anchor", "positive"), map(dict, columns)))
        return batch | ({"labels": torch.arange(len(pairs))} if self.labels else {})


def step_of_transformers(tiny_model, folder, labels, accumulated=1, **arguments):
    """What transformers' Trainer makes of the model in one step of SGD (docs/sentence_transformers.md), and of which rows."""
    from transformers import Trainer, TrainingArguments

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return fused_infonce(*outputs, temperature=0.05) / args.gradient_accumulation_steps

    args = TrainingArguments(
        output_dir=str(folder), max_steps=1, gradient_accumulation_steps=accumulated, learning_rate=RATE, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, **arguments,
    )  # fmt: skip
    model, collate = TwoViews(tiny_model), Collator(tiny_model, labels)
    Trainer(model=model, args=args, train_dataset=PAIRS, data_collator=collate, compute_loss_func=compute_loss).train()
    return model, collate.batches


def step_of_a_loop(tiny_model, batches, rate=RATE):
    """The same of plain PyTorch: the mean of the batches' losses, one step of SGD."""
    model, collate = TwoViews(tiny_model), Collator(tiny_model)
    for batch in batches:
        z1, z2 = (torch.nn.functional.normalize(z) for z in model(**collate(batch)))
        loss = torch.nn.functional.cross_entropy(z1 @ z2.T / 0.05, torch.arange(len(batch)))
        (loss / len(batches)).backward()
    torch.optim.SGD(model.parameters(), lr=rate).step()
    return model


def assert_same_weights(ours, theirs):
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
