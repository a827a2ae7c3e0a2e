"""The values that settings may have by name, and the numbers that are defaults. Nothing heavy is imported here."""

from __future__ import annotations

import re

BUNDLED = "bundled"  # name of the encoder that comes with the training extras
DEFAULT_LAYERS = "0,2,4"  # of the bundled MiniLM: every other layer, so that there is something to learn
DEFAULT_STEPS = 100
SHORTEST = 32  # of the lengths that a static table has by default
EVALUATIONS = 10  # during a run, when --eval-steps is not given
SAVE_MINUTES = 10  # between checkpoints, when --save-steps is not given
FORMATS = ("txt", "tsv", "csv", "jsonl", "parquet")  # of --train-file
# Of single sentences: the same sentence again, the one after it, or the same with the case of some words switched.
POSITIVES = ("dropout", "next", "switch-case")
SWITCHED = 0.1  # of the words
DEVICES = ("auto", "cpu", "cuda", "mps")
POOLINGS = ("cls", "mean", "first-last")
HEADS = ("mlp",)  # of training alone
AS_LOADED = "as-loaded"
DTYPES = ("float32", "bfloat16", "float16")
GRANULARITIES = ("weight", "block", "head", "neuron")  # and n:m with numbers, as in 2:4
SCOPES = ("global", "layer")
MEANS = ("global", "layer")
KEEP = ("last", "best")
SCHEDULES = ("linear", "cosine", "constant")  # of the learning rate, after the warm-up
REPORTERS = ("tensorboard", "wandb", "mlflow")
# What --static changes of the defaults. A table is trained in large batches: a step is cheap, and negatives are many.
BATCH_SIZE, STATIC_BATCH_SIZE = 64, 2048
MAX_LENGTH, STATIC_MAX_LENGTH = 32, 256
EVAL_BATCH_SIZE, STATIC_EVAL_BATCH_SIZE = 64, 512
STATIC_LR, STATIC_INIT_LR = 0.2, 0.01  # of a random table, and of one that knows something already


def n_of_m(granularity: str) -> tuple[int, int] | None:
    """ "2:4" -> (2, 4); None for anything else, and for an n that is not in [1, m]."""
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", granularity)
    if found is None:
        return None
    n, m = int(found[1]), int(found[2])
    return (n, m) if 1 <= n <= m else None
