"""The table of cases that every backend is held to. Shapes are ragged on purpose: 1, tile - 1, tile + 1, primes."""

from __future__ import annotations

import torch

from oracle import Case


def _ids(n: int, groups: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, groups, (n,), generator=torch.Generator().manual_seed(seed))


def _weights(n: int) -> torch.Tensor:
    return torch.linspace(0, 2, n, dtype=torch.float64)


def _guides(
    B: int, N: int, *widths: int, dtype: torch.dtype = torch.float64
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By widths; the guides agree with each other and with the positives."""
    g = torch.Generator().manual_seed(B + N)
    base = torch.randn(N, 8, generator=g, dtype=torch.float64)
    pairs = []
    for width in widths:
        turn = torch.randn(8, width, generator=g, dtype=torch.float64)
        keys = (base @ turn + 0.3 * torch.randn(N, width, generator=g, dtype=torch.float64)).to(dtype)
        rows = (base[:B] @ turn + 0.3 * torch.randn(B, width, generator=g, dtype=torch.float64)).to(dtype)
        pairs.append((rows, keys))
    return pairs


def lists(B: int, N: int, first: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Row i lists i % 4 of the keys from ``first`` on, in no order."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.arange(B) % 4
    index = [torch.randperm(N - first, generator=g)[: int(n)] + first for n in counts]
    return torch.cat([torch.zeros(1).long(), counts.cumsum(0)]), torch.cat(index)


EVERY, BOTH = ["qd", "qq", "dq", "dd"], ["qd", "dq"]

SHAPES = [
    Case(1, None, 5),
    Case(1, 3, 2),
    Case(2, None, 7),
    Case(15, None, 33),
    Case(16, 17, 16),
    Case(17, 31, 97),
    Case(63, 65, 64),
    Case(64, None, 128),
    Case(127, 257, 31),
    Case(129, 512, 48, focal=False),
    Case(101, 331, 40, tensors=True),
]

LOGITS = [
    Case(temperature=0.01),
    Case(temperature=1.0),
    Case(temperature=0.01, focal=False),
    Case(temperature=1.0, focal=False),
    Case(m=0.0),
    Case(m=-1.5),
    Case(m=3.0),
    Case(33, 70, tensors=True),
    Case(33, 70, tensors=True, temperature=0.01),
    Case(33, 70, tensors=True, focal=False),
]

HOSTILE = [
    Case(kind="confident"),
    Case(kind="confident", temperature=0.02),
    Case(kind="duplicates"),
    Case(kind="equal"),
    Case(kind="zeros"),
    Case(kind="zeros", focal=False),
    Case(kind="scales", D=64),
    Case(kind="far"),
    Case(17, 31, kind="far", focal=False),
    Case(kind="opposite"),
    Case(kind="opposite", temperature=0.01, focal=False),
]

# With temperature and m as tensors: seeds for which their gradients do not cancel, as float32 would leave few digits.
OPTIONS = [
    Case(20, 47, options={"positives": torch.arange(20) * 2 + 3}),
    Case(20, 5, options={"positives": torch.arange(20) % 5}),
    Case(20, 60, options={"hard_negative_weight": 1.5}),
    Case(20, 40, options={"hard_negative_weight": -2.0}, tensors=True),
    Case(20, 60, options={"hard_negative_weight": 1.0, "positives": torch.arange(20) + 20}),
    Case(40, 90, options={"query_ids": _ids(40, 6), "key_ids": _ids(90, 6, 1)}),
    Case(9, options={"query_ids": torch.zeros(9).long(), "key_ids": torch.zeros(9).long()}),  # no negatives at all
    Case(40, 300, options={"exclude_above": 0.013}),
    Case(40, 90, options={"exclude_above": -0.497}, tensors=True),
    Case(20, 40, options={"exclude_above": 0.2, "exclude_by": "constant"}),
    Case(20, 40, options={"exclude_above": 0.1, "exclude_by": "relative"}, tensors=True),
    Case(kind="opposite", options={"exclude_above": 0.5, "exclude_by": "relative"}),  # similarities below 0
    Case(40, 90, options={"exclude_above": torch.linspace(-0.5, 0.3, 40)}),
    Case(40, 90, focal=False, options={"exclude_above": torch.linspace(-0.5, 0.3, 40), "exclude_by": "relative"}),
    Case(20, 47, options={"guides": _guides(20, 47, 12)}),
    Case(
        40, 300, focal=False, options={"guides": _guides(40, 300, 12, 5), "guide_weights": [1, 3], "guide_above": -0.4}
    ),
    Case(33, 66, options={"guides": _guides(33, 66, 12), "guide_above": -0.3, "guide_by": "relative"}, tensors=True),
    Case(
        20, 40, options={"guides": _guides(20, 40, 9, dtype=torch.bfloat16), "guide_above": 0.2, "guide_by": "constant"}
    ),
    Case(20, 47, options={"guide_logits": torch.linspace(-1, 1, 20 * 47).sin().view(20, 47), "guide_above": -0.1}),
    Case(20, 60, options={"guides": _guides(20, 60, 12), "positives": torch.arange(20) * 2 + 3, "exclude_above": 0.2}),
    Case(33, 50, options={"positive_margin": 0.2}),
    Case(33, 50, focal=False, options={"positive_margin": -0.3}, tensors=True),
    Case(33, 50, temperature=0.01, options={"positive_margin": 0.5}, tensors=True),
    Case(33, 99, focal=False, options={"hardness": 5.0}, tensors=True),
    Case(33, 99, options={"hardness": 9.0, "hardness_mode": "hard_negatives", "hard_negative_weight": -1.0}),
    Case(33, 99, focal=False, options={"hardness": 9.0, "hardness_mode": "in_batch_negatives"}, tensors=True),
    Case(33, 50, temperature=0.01, focal=False, options={"hardness": 20.0, "positive_margin": 0.1}),
    Case(kind="unit", options={"normalize": False}),
    Case(30, 50, kind="unit", options={"normalize": False}, tensors=True, seed=1),
    Case(kind="random", D=8, options={"normalize": False}, temperature=1.0),  # dot products far outside [-1, 1]
    Case(33, 50, options={"reduction": "sum"}),
    Case(33, 50, options={"reduction": "none"}),
    Case(33, 50, options={"weight": _weights(33)}),
    Case(33, 50, options={"weight": _weights(33), "reduction": "sum"}, tensors=True, seed=1),
    Case(33, 50, options={"weight": _weights(33), "reduction": "none"}, tensors=True, seed=1),
    Case(
        24,
        72,
        tensors=True,
        options={
            "query_ids": _ids(24, 5),
            "key_ids": _ids(72, 5, 1),
            "hard_negative_weight": 0.7,
            "exclude_above": 0.31,
            "weight": _weights(24),
        },
    ),
]

SYMMETRIC = [
    Case(1, options={"symmetric": True}),
    Case(17, options={"symmetric": True}),
    Case(65, options={"symmetric": True}, tensors=True),
    Case(65, options={"symmetric": True}, tensors=True, focal=False),
    Case(40, options={"symmetric": True}, temperature=0.01),
    Case(40, options={"symmetric": True, "exclude_above": -0.417}),
    Case(40, options={"symmetric": True, "query_ids": _ids(40, 6), "key_ids": _ids(40, 6, 1)}),
    Case(40, options={"symmetric": True, "exclude_above": 0.3, "exclude_by": "constant"}),
    Case(40, options={"symmetric": True, "exclude_above": torch.linspace(-0.5, 0.3, 40), "exclude_by": "relative"}),
    Case(40, options={"symmetric": True, "positive_margin": 0.2, "hardness": 4.0}, tensors=True, seed=5),
    Case(9, options={"symmetric": True, "query_ids": torch.zeros(9).long(), "key_ids": torch.zeros(9).long()}),
    Case(300, options={"symmetric": True, "weight": _weights(300)}),
    Case(40, options={"symmetric": True, "reduction": "none", "weight": _weights(40)}, tensors=True),
    Case(33, kind="confident", options={"symmetric": True}),
    Case(33, kind="zeros", options={"symmetric": True}),
    Case(33, kind="far", options={"symmetric": True}),
    Case(33, kind="unit", options={"symmetric": True, "normalize": False}),
]

PARTS = [
    Case(options={"directions": EVERY}),
    Case(33, 66, options={"directions": EVERY}, focal=False),
    Case(33, 70, options={"directions": ["qd", "dq"], "exclude_above": 0.1, "positive_margin": 0.1}, temperature=0.01),
    Case(33, 66, options={"directions": ["qd", "qq", "dd"], "exclude_above": 0.1}, focal=False, tensors=True),
    Case(33, 66, options={"directions": BOTH, "partition": "per_direction"}, tensors=True, seed=1),
    Case(40, 80, options={"directions": BOTH, "partition": "per_direction", "exclude_above": torch.linspace(-0.5, 0.3, 40)}),
    Case(9, options={"directions": BOTH, "partition": "per_direction", "query_ids": torch.zeros(9).long(), "key_ids": torch.zeros(9).long()}),
    Case(40, 80, options={"directions": EVERY, "query_ids": _ids(40, 6), "key_ids": _ids(80, 6, 1), "weight": _weights(40)}),
    Case(33, 66, options={"directions": EVERY, "hard_negative_weight": -1.0, "hardness": 5.0, "reduction": "none"}),
    Case(1, options={"directions": EVERY}),
    Case(1, options={"directions": BOTH, "partition": "per_direction"}),
    Case(kind="confident", options={"directions": EVERY}),
    Case(kind="confident", options={"directions": BOTH, "partition": "per_direction"}),
    Case(kind="duplicates", options={"directions": EVERY}, focal=False),
    Case(kind="zeros", options={"directions": EVERY}),
    Case(kind="far", options={"directions": EVERY}),
    Case(kind="unit", options={"directions": EVERY, "normalize": False}),
    Case(kind="random", D=8, options={"directions": EVERY, "normalize": False}, temperature=1.0),
    Case(20, 47, options={"negatives": lists(20, 47, 20)}),
    Case(20, 47, options={"negatives": lists(20, 47, 30), "hard_negative_weight": 0.7}, focal=False, tensors=True),
    Case(20, 47, options={"negatives": lists(20, 47, 30), "positives": torch.arange(20) + 5, "hardness": 5.0, "hardness_mode": "hard_negatives"}),
    Case(33, 90, options={"negatives": lists(33, 90, 33), "query_ids": _ids(33, 6), "key_ids": _ids(90, 6, 1), "exclude_above": 0.31}),
    Case(33, 90, options={"negatives": lists(33, 90, 40), "guides": _guides(33, 90, 12), "guide_above": -0.3}, focal=False),
    Case(20, 47, options={"negatives": lists(20, 47, 20), "guide_logits": torch.linspace(-1, 1, 20 * 47).sin().view(20, 47), "guide_above": -0.1}),
    Case(4, 7, options={"negatives": (torch.zeros(5).long(), torch.zeros(0).long())}),
    Case(4, 7, options={"negatives": (torch.tensor([0, 3, 3, 3, 6]), torch.tensor([4, 5, 6, 6, 5, 4]))}, temperature=0.01),  # no key shared but the positives
    Case(kind="confident", N=40, options={"negatives": lists(16, 40, 16)}),
    Case(kind="far", N=40, options={"negatives": lists(16, 40, 16)}),
    Case(kind="unit", N=40, options={"normalize": False, "negatives": lists(16, 40, 16), "weight": _weights(16)}, tensors=True),
]  # fmt: skip

WHOLE = {"dims": [32, 7, 16]}
MATRYOSHKA = [
    Case(1, None, 5, options={"dims": [5, 2]}),
    Case(1, 3, 2, options={"dims": [2]}),
    Case(17, 31, 97, options={"dims": [96, 1, 64, 33]}),
    Case(63, 65, 64, options={"dims": [8, 64], "dim_weights": [0.2, 3.0]}, focal=False),
    Case(20, 530, 40, options={"dims": [10, 20, 30]}),
    Case(9, 20, 20, options={"dims": list(range(1, 17))}, temperature=0.5),
    Case(9, 20, 20, options={"dims": list(range(2, 20))}, temperature=0.5),  # more than a kernel takes at once
    Case(options=WHOLE, temperature=0.01),
    Case(33, 70, options={**WHOLE, "dim_weights": [1, 0, 2]}, tensors=True),
    Case(33, 70, options=WHOLE, tensors=True, temperature=0.01, focal=False),
    *(Case(kind=kind, options=WHOLE) for kind in ("confident", "duplicates", "equal", "zeros", "scales", "far", "opposite")),
    Case(17, 31, kind="far", focal=False, options=WHOLE),
    Case(20, 47, options={**WHOLE, "positives": torch.arange(20) * 2 + 3}),
    Case(20, 60, options={**WHOLE, "hard_negative_weight": 1.5}),
    Case(40, 90, options={**WHOLE, "query_ids": _ids(40, 6), "key_ids": _ids(90, 6, 1)}),
    Case(9, options={**WHOLE, "query_ids": torch.zeros(9).long(), "key_ids": torch.zeros(9).long()}),  # no negatives at all
    Case(40, 90, options={**WHOLE, "exclude_above": torch.linspace(-0.5, 0.3, 40), "exclude_by": "relative"}),
    Case(20, 40, options={**WHOLE, "exclude_above": 0.2, "exclude_by": "constant"}),
    Case(20, 60, options={**WHOLE, "guides": _guides(20, 60, 12), "guide_above": -0.3, "exclude_above": 0.2}),
    Case(33, 99, focal=False, options={**WHOLE, "hardness": 9.0, "hardness_mode": "in_batch_negatives", "positive_margin": 0.1}),
    Case(30, 50, kind="unit", options={"normalize": False, **WHOLE}, tensors=True, seed=1),
    Case(33, 50, options={**WHOLE, "weight": _weights(33), "reduction": "none"}, tensors=True, seed=1),
    Case(33, 50, options={**WHOLE, "weight": _weights(33)}),
    Case(33, 50, options={**WHOLE, "reduction": "sum"}),
    Case(65, options={**WHOLE, "symmetric": True}, tensors=True),
    Case(40, options={**WHOLE, "symmetric": True, "exclude_above": torch.linspace(-0.5, 0.3, 40), "query_ids": _ids(40, 6), "key_ids": _ids(40, 6, 1)}),
    Case(33, kind="far", options={**WHOLE, "symmetric": True}),
    Case(40, options={**WHOLE, "symmetric": True, "reduction": "none", "weight": _weights(40)}, tensors=True),
    Case(33, 66, options={**WHOLE, "directions": EVERY, "exclude_above": 0.1}, focal=False),
    Case(20, 47, options={**WHOLE, "negatives": lists(20, 47, 30), "hard_negative_weight": 0.7}),
]  # fmt: skip

ALL = [*SHAPES, *LOGITS, *HOSTILE, *OPTIONS, *SYMMETRIC, *PARTS]
