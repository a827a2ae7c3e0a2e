"""One of several processes: runs pycse commands one after the other and writes down what each did on this rank.

    RANK=… WORLD_SIZE=… python one_of_several.py COMMANDS.json RESULTS.json

COMMANDS.json is {name: arguments}; {rank} in an argument is the process's. In the command that is named "broken" the
last rank's loss raises. The last rank's scores of parameters are not what they should be, as if its processor rounded
otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from typer.testing import CliRunner

from pycse.cli import app
from pycse.training import pruning
from pycse.training import train as training

RANK, LAST = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1


def digest(tensors) -> str:
    """Of names and bits."""
    state = hashlib.sha256()
    for name, tensor in tensors:
        state.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


class Watched:
    """What a command's encoder and loss were."""

    def __init__(self, broken: bool) -> None:
        self.encoder: torch.nn.Module | None = None
        self.losses: list[float] = []
        self.broken = broken

    def load(self, *arguments, **options):
        self.encoder = LOAD(*arguments, **options)
        return self.encoder

    def build(self, *arguments):
        loss = BUILD(*arguments)
        loss.register_forward_hook(self.seen)
        return loss

    def seen(self, _module, _columns, value) -> None:
        if self.broken:
            raise RuntimeError("broken on purpose")
        self.losses.append(value.item())

    def state(self) -> dict:
        if self.encoder is None:
            return {}
        masks = [(name, buffer) for name, buffer in self.encoder.named_buffers() if name.endswith("mask")]
        return {
            "weights": digest(sorted(self.encoder.state_dict().items())),
            "masks": digest(masks),
            "masked": len(masks),
            "losses": self.losses,
            "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        }


def scored(*arguments, **options):
    scores = SCORE(*arguments, **options)
    return {name: score * (1 + torch.rand_like(score)) for name, score in scores.items()} if RANK == LAST else scores


LOAD, BUILD, SCORE = training.load_encoder, training.build_loss, pruning.score
pruning.score = scored
results = {}
for name, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
    watched = Watched(name == "broken" and RANK == LAST)
    training.load_encoder, training.build_loss = watched.load, watched.build
    done = CliRunner().invoke(app, [argument.replace("{rank}", str(RANK)) for argument in arguments])
    known = done.exception is None or isinstance(done.exception, SystemExit)
    results[name] = {
        "code": done.exit_code,
        "out": done.stdout,
        "err": done.stderr if known else repr(done.exception),
        **watched.state(),
    }
    Path(sys.argv[2]).write_text(json.dumps(results))
