"""What ranks send: the table of docs/scaling.md, counted."""

import pytest
import torch
import torch.distributed as dist
from shared_batches import Shared, on_rank

from pycse.distributed import collectives


def counted(rank, group, case):
    """The collectives of one call, with the bytes that a rank gets (gathered) or gives (reduced)."""
    calls, originals = [], {}

    def size(t):
        return t.numel() * t.element_size()

    def watched(module, name, measured):
        original = originals[module, name] = getattr(module, name)

        def call(*args, **kwargs):
            calls.append((name.strip("_"), measured(args)))
            return original(*args, **kwargs)

        setattr(module, name, call)

    watched(collectives, "_GATHER", lambda a: size(a[0]))
    watched(collectives, "_SCATTER", lambda a: size(a[1]))
    watched(dist, "batch_isend_irecv", lambda a: size(a[0][0].tensor))
    for name in ("all_reduce", "all_gather_object", "broadcast", "barrier", "all_gather", "all_to_all_single"):
        watched(dist, name, lambda a: 0)
    try:
        on_rank(rank, group, case)
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)
    return calls


GATHER, SCATTER, REDUCE = "GATHER", "SCATTER", "all_reduce"
FORWARD = [GATHER, GATHER]
PASSED = "batch_isend_irecv"


@pytest.mark.parametrize(
    "case, expected",
    [
        (Shared((6, 6)), [*FORWARD, SCATTER]),
        (Shared((6, 5), "focal", batch=("ids", "guides")), [*FORWARD, SCATTER]),
        (Shared((6, 6), "focal", tensors=True), [*FORWARD, SCATTER, REDUCE]),
        (Shared((6, 6), batch=("weight",)), [*FORWARD, SCATTER, REDUCE]),
        (Shared((6, 6), without=("z2",)), FORWARD),
        (Shared((6, 6), options={"symmetric": True}), [*FORWARD, SCATTER]),
        (Shared((6, 6), "sigmoid", tensors=True), [*FORWARD, SCATTER, REDUCE]),
        (Shared((6, 6), "supcon"), [*FORWARD, SCATTER]),
        (Shared((6, 6), "distillcse"), [*FORWARD, SCATTER]),
        (Shared((6, 6), "distill"), [*FORWARD, SCATTER]),
        (Shared((6, 6), "uniformity"), [*FORWARD, GATHER, REDUCE]),
        (Shared((6, 6), "alignment"), [GATHER]),
        (Shared((6, 6), exchange="ring"), [GATHER, PASSED, PASSED, PASSED]),
        (Shared((6, 6, 6), exchange="ring", tensors=True), [GATHER, *4 * [PASSED], PASSED, PASSED, REDUCE]),
    ],
    ids=str,
)
def test_collectives_of_a_call(ranks, case, expected):
    for calls in ranks.run(case.size, counted, case):
        assert [name for name, _ in calls] == expected


def test_bytes_of_a_call(ranks):
    B, D = 64, 16
    _, (_, payload), home = ranks.run(2, counted, Shared((B, B), D=D))[0]
    assert payload == 2 * B * D * 4 and home == (SCATTER, 2 * B * D * 4)
    # In 16 bits keys travel in 16 bits; their gradients are summed in 32.
    case = Shared((B, B), D=D, dtype=torch.bfloat16, batch=("ids",))
    _, (_, payload), home = ranks.run(2, counted, case)[0]
    assert payload == 2 * (B * D * 2 + B * 8) and home == (SCATTER, 2 * B * D * 4)
