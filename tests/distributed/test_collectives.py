"""What ranks send: the table of docs/scaling.md, counted."""

import pytest
import torch
import torch.distributed as dist
from shared_batches import Shared, on_rank

HEADER, PAYLOAD, HOME, NUMBERS = "header", "payload", "reduce_scatter", "all_reduce"


def counted(rank, group, case):
    """The collectives of one call, with the bytes that a rank gets (gathered) or gives (reduced)."""
    calls = []

    def watched(name, size):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            calls.append((name, size(args)))
            return original(*args, **kwargs)

        setattr(dist, name, call)
        return original

    def size(t):
        return t.numel() * t.element_size()

    originals = {
        "all_gather_into_tensor": watched("all_gather_into_tensor", lambda a: size(a[0])),
        "reduce_scatter_tensor": watched("reduce_scatter_tensor", lambda a: size(a[1])),
        "all_reduce": watched("all_reduce", lambda a: size(a[0])),
        "all_gather_object": watched("all_gather_object", lambda a: 0),
        "broadcast": watched("broadcast", lambda a: 0),
        "barrier": watched("barrier", lambda a: 0),
    }
    try:
        on_rank(rank, group, case)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return calls


GATHER, SCATTER, REDUCE = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"
FORWARD = [GATHER, GATHER]


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
    ],
    ids=str,
)
def test_collectives_of_a_call(ranks, case, expected):
    first, second = ranks.run(2, counted, case)
    assert [name for name, _ in first] == [name for name, _ in second] == expected


def test_bytes_of_a_call(ranks):
    B, D = 64, 16
    _, (_, payload), home = ranks.run(2, counted, Shared((B, B), D=D))[0]
    assert payload == 2 * B * D * 4 and home == (SCATTER, 2 * B * D * 4)
    # In 16 bits keys travel in 16 bits; their gradients are summed in 32.
    case = Shared((B, B), D=D, dtype=torch.bfloat16, batch=("ids",))
    _, (_, payload), home = ranks.run(2, counted, case)[0]
    assert payload == 2 * (B * D * 2 + B * 8) and home == (SCATTER, 2 * B * D * 4)
