"""Each loss over 1 to 4 ranks against one process on the joined batch: value and every gradient."""

from dataclasses import replace

import pytest
import torch
from shared_batches import Shared, compare, on_rank

from pycse.distributed import ring

F64, BF16 = torch.float64, torch.bfloat16
EVERY = {"directions": ["qd", "qq", "dq", "dd"]}

CASES = [
    Shared((7,)),
    Shared((6, 6)),
    Shared((5, 9)),
    Shared((5, 0)),
    Shared((0, 4), upstream=True),
    Shared((3, 4, 5), "focal", upstream=True, tensors=True),
    Shared((3, 4, 0, 5), "focal", upstream=True, tensors=True, batch=("weight",)),
    Shared((4, 4), "focal", hard=2, tensors=True),
    Shared((4, 7), "focal", hard=1, options={"hard_negative_weight": 0.7}),
    Shared((4, 0, 7), "focal", hard=1, options={"hardness": 3.0, "hardness_mode": "hard_negatives"}),
    Shared((5, 6), hard=1, options={"hardness": 3.0, "hardness_mode": "in_batch_negatives"}, tensors=True),
    Shared((4, 6), keys=(9, 11), batch=("positives", "ids")),
    Shared((4, 6), keys=(9, 7)),
    Shared((4, 6, 5), batch=("ids", "weight", "exclude"), upstream=True),
    Shared((4, 6), batch=("exclude",), options={"exclude_by": "relative"}),
    Shared((4, 6), options={"exclude_above": 0.1, "positive_margin": 0.1}),
    Shared((4, 6), batch=("guides",), options={"guide_above": -0.1}),
    Shared((4, 6), hard=1, batch=("lists", "ids"), options={"hard_negative_weight": 0.5}, tensors=True),
    Shared((4, 6, 1), hard=1, batch=("lists",), upstream=True),
    Shared((4, 6), "focal", batch=("queue",)),
    Shared((3, 3, 0), "focal", batch=("queue",)),
    Shared((4, 0, 3), hard=1, batch=("lists",)),
    Shared((0, 4), options={"directions": ["qd", "dq"], "partition": "per_direction"}),
    Shared((4, 6), "focal", batch=("queue", "positives", "ids")),
    Shared((5, 7), "focal", options={"symmetric": True}, tensors=True, upstream=True),
    Shared((5, 0, 7), "focal", options={"symmetric": True}, batch=("weight", "ids", "exclude")),
    Shared((5, 5), options={"symmetric": True, "hardness": 2.0}),
    Shared((5, 7), options=EVERY, tensors=True, batch=("ids", "exclude")),
    Shared((5, 7, 2), options=EVERY, hard=1, batch=("weight",), upstream=True),
    Shared((5, 7), options={"directions": ["qd", "dq"], "partition": "per_direction"}),
    Shared((5, 7), options={"directions": ["qd", "dd"]}, hard=2),
    Shared((5, 7), options={"reduction": "sum"}, batch=("weight",), upstream=True),
    Shared((5, 7), options={"reduction": "none"}, batch=("weight",), upstream=True),
    Shared((5, 7, 0), "focal", options={"reduction": "none"}),
    Shared((5, 7), "focal", options={"normalize": False}),
    Shared((5, 7), without=("z1",)),
    Shared((5, 7), without=("z2",), tensors=True),
    Shared((5, 7), without=("z1", "z2")),
    Shared((5, 7), "log-sums", options={"include_positive": False}, upstream=True),
    Shared((5, 7), "log-sums", keys=(3, 4)),
    Shared((5, 0), "log-sums"),
    Shared((5, 7), "sigmoid", tensors=True, upstream=True),
    Shared((5, 7, 0), "sigmoid", tensors=True, batch=("ids", "weight"), hard=1),
    Shared((5, 7), "adapacse", tensors=True, batch=("guides", "ids")),
    Shared((5, 7), "supcon", tensors=True, upstream=True),
    Shared((5, 0, 7), "supcon", batch=("weight",), options={"inside": True}),
    Shared((5, 7), "supcon pairs", keys=(8, 9), tensors=True),
    Shared((9, 12), "distill"),
    Shared((9, 0, 5), "distill", batch=("weight",), options={"shuffle": "expected", "divergence": "js"}, upstream=True),
    Shared((9, 5), "distill", options={"shuffle": "none", "divergence": "kl", "reduction": "none"}),
    Shared((9, 5), "distill", options={"group_size": 3, "teacher_weights": [0.3, 0.7]}),
    Shared((9, 5), "distill", options={"span": (2, 6)}),
    Shared((9, 5, 4), "distillcse", tensors=True, batch=("weight", "ids"), upstream=True, hard=1),
    Shared((9, 5), "distillcse", options={"m": 0.2, "symmetric": True, "distill_weight": 0.3}),
    Shared(
        (9, 5), "distillcse", batch=("guides",), options={"distill_weight": 0.3, "hard_negative_weight": 0.4}, hard=1
    ),
    Shared((9, 5, 2), "uniformity", upstream=True),
    Shared((9, 1, 0, 4), "uniformity", options={"t": 30.0}),
    Shared((9, 5), "uniformity", options={"normalize": False}),
    Shared((9, 0, 4), "alignment", upstream=True),
]
DIMS = {"dims": [4, 16, 9], "dim_weights": [1.0, 0.5, 2.0], "parts": True}
SEVERAL = (0.1, 0.2, 0.3)
LENGTHS = [
    Shared((5, 9), options=DIMS),
    Shared((4, 0, 5), options=DIMS, tensors=True, upstream=True),
    Shared((5, 7), "focal", options=DIMS, tensors=True, temperatures=SEVERAL, batch=("ids", "weight"), upstream=True),
    Shared((5, 7), options=DIMS | {"reduction": "none"}, temperatures=SEVERAL, batch=("weight",), upstream=True),
    Shared((5, 0, 7), options=DIMS | {"reduction": "none"}, tensors=True, temperatures=SEVERAL),
    Shared((5, 7), "focal", options=DIMS | {"symmetric": True}, tensors=True, temperatures=SEVERAL, batch=("ids",)),
    Shared((5, 0, 7), options=DIMS | {"symmetric": True}, batch=("weight", "exclude")),
    Shared((4, 6), "focal", options=DIMS, batch=("queue", "positives", "ids")),
    Shared((3, 0, 4), options=DIMS, batch=("queue",), tensors=True),
    Shared((4, 6), options=DIMS, hard=1, batch=("lists",)),
    Shared((4, 6, 3), options=DIMS | EVERY, hard=1),
    Shared((4, 6), options=DIMS | {"guide_above": -0.1}, batch=("guides",), without=("z1",)),
    Shared((4, 6), "focal", options=DIMS | {"reduction": "sum"}, hard=2, without=("z2",), tensors=True),
    Shared((5, 7), "sigmoid", options=DIMS, tensors=True, batch=("ids",), upstream=True),
    Shared((5, 0, 7), "sigmoid", options=DIMS | {"reduction": "none"}, batch=("weight",)),
    Shared((5, 7), "adapacse", options=DIMS, batch=("guides", "ids"), tensors=True, temperatures=SEVERAL),
    Shared((5, 0, 7), "supcon", options=DIMS, tensors=True, temperatures=SEVERAL, batch=("weight",), upstream=True),
    Shared((5, 7), "supcon pairs", options=DIMS, keys=(8, 9)),
    Shared((9, 5), "distill", options=DIMS, upstream=True),
    Shared((9, 0, 5), "distill", options=DIMS | {"shuffle": "expected", "reduction": "none"}, batch=("weight",)),
    Shared((9, 5), "distillcse", options=DIMS, tensors=True, temperatures=SEVERAL, batch=("ids", "weight"), hard=1),
    Shared((9, 0, 5), "distillcse", options=DIMS | {"m": 0.2, "symmetric": True}, tensors=True, upstream=True),
]
ALL = (torch.float32, F64, BF16)
WAYS = [("cpu", "gather", ALL), ("torch", "gather", (F64,)), ("reference", "gather", (F64,)), ("cpu", "ring", ALL),
        ("torch", "ring", (F64,))]  # fmt: skip


@pytest.mark.parametrize("backend, exchange, dtypes", WAYS, ids=lambda x: x if isinstance(x, str) else "")
def test_ranks_are_the_joined_batch(ranks, backend, exchange, dtypes):
    in_ring = ("infonce", "focal", "log-sums")
    compared(ranks, [c for c in CASES if exchange == "gather" or c.loss in in_ring], backend, exchange, dtypes)


@pytest.mark.parametrize("backend, dtypes", [("cpu", ALL), ("torch", (F64,)), ("reference", (F64,))])
def test_several_lengths(ranks, backend, dtypes):
    compared(ranks, LENGTHS, backend, "gather", dtypes)


def compared(ranks, cases, backend, exchange, dtypes):
    failures = []
    for given in cases:
        for dtype in dtypes:
            case = replace(given, backend=backend, exchange=exchange, dtype=dtype)
            try:
                compare(case, ranks.run(case.size, on_rank, case))
            except AssertionError as error:
                failures.append(str(error))
    assert not failures, "\n".join(failures)


def by_bytes(rank, group, case, most):
    """The bytes that travel in the forward of exchange="auto", where so many may be gathered."""
    sent = []
    original, given = ring._passed, ring.GATHERED_BYTES
    ring._passed = lambda group, held, coming, what: sent.append(held.numel()) or original(group, held, coming, what)
    ring.GATHERED_BYTES = most
    try:
        return on_rank(rank, group, case), sum(sent)
    finally:
        ring._passed, ring.GATHERED_BYTES = original, given


def test_auto_goes_by_bytes(ranks):
    """float32 keys of 16 features and their gradients: 128 bytes a key."""
    case = Shared((6, 6), exchange="auto")
    for most, travels in ((12 * 128, False), (12 * 128 - 1, True)):
        results = ranks.run(2, by_bytes, case, most)
        compare(case, [one for one, _ in results])
        assert all((sent > 0) == travels for _, sent in results)


def test_ring_needs_blocks(ranks):
    for fine, result in ranks.outcomes(2, on_rank, Shared((4, 4), backend="reference", exchange="ring")):
        assert not fine and "exchange='ring' needs a backend that takes keys in blocks" in result[1]
