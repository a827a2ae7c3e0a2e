"""Calls that must be refused: one argument is wrong, and the error says which, before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fuzz.calls import Fault
from fuzz.problems import FUNCTIONS, MODULES
from pycse.sparse import SparseLinear
from pycse.validation.contrastive_losses import EXCLUSIVE

B, D, OUT = 4, 6, 5


@dataclass(frozen=True)
class With:
    """A value that is wrong beside others."""

    value: Any
    others: dict[str, Any]


Z = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(B)
NOT_NUMBERS: tuple[Any, ...] = (
    "0.05",
    None,
    True,
    1j,
    [0.05],
    object(),
    torch.ones(2),
    np.ones(2),
    b"1",
    {},
    torch.ones((), dtype=torch.int64),
)
NOT_FINITE: tuple[Any, ...] = (
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    torch.tensor(math.nan),
    torch.tensor(math.inf),
    np.float32(math.nan),
)
NOT_FLAGS: tuple[Any, ...] = (None, 1, 0, "True", torch.tensor(True), np.bool_(True), [])
NOT_NAMES: tuple[Any, ...] = ("gpu", "", None, 3, ["cpu"], "CPU", b"cpu", torch, torch.ones(3))
NOT_EMBEDDINGS: tuple[Any, ...] = (
    None, 1.0, [[1.0, 2.0]], np.ones((B, D), np.float32), Z[0], Z[None], Z[:0], Z[:, :0], Z.long(), Z > 0,
    Z.to(torch.complex64),
    Z.to_sparse(), Z.to_sparse_csr(), Z.to(torch.float8_e4m3fn), torch.quantize_per_tensor(Z, 0.1, 0, torch.qint8),
    torch.nested.nested_tensor([Z[0], Z[1]]), Z.to("meta"), torch.nested.nested_tensor([Z[0], Z[1]],
    layout=torch.jagged),
)  # fmt: skip
NOT_IDS: tuple[Any, ...] = (
    IDS[:3], IDS[None], IDS.double(), IDS > 0, [0, 1, 2, 3], 1, IDS.to("meta"), IDS.to(torch.complex64),
    IDS.to_sparse(), np.arange(B),
)  # fmt: skip
NOT_WEIGHTS: tuple[Any, ...] = (
    torch.ones(3), torch.ones(B, 1), IDS, [1.0] * B, 2.0, torch.ones(B, device="meta"), torch.ones(B,
    dtype=torch.complex64),
    torch.ones(B).to_sparse(),
)  # fmt: skip
NOT_TEACHERS: tuple[Any, ...] = (
    [], Z, [Z[:3]], [Z[0]], [None], "teachers", [Z.long()], [Z, Z.to_sparse()], [Z.clone().requires_grad_()],
    [Z.to("meta")], 3, {0: Z},
)  # fmt: skip
NOT_SEEDS: tuple[Any, ...] = (
    1.5,
    True,
    "1",
    2**64,
    -(2**63) - 1,
    torch.ones(2).long(),
    torch.tensor(1.0),
    [1],
    torch.tensor(1, device="meta"),
)
NOT_MASKS: tuple[Any, ...] = (
    None, [[True]], torch.ones(OUT, D), torch.ones(OUT, D + 1).bool(), torch.ones(OUT).bool(), torch.ones(OUT, 2,
    dtype=torch.int32),
    torch.ones(OUT, D, dtype=torch.bool, device="meta"), torch.ones(OUT, D).bool().to_sparse(), 1,
)  # fmt: skip

PTR, NONE = torch.arange(B + 1), torch.zeros(B + 1, dtype=torch.int64)
NOT_GUIDES: tuple[Any, ...] = (
    [], Z, [Z], [Z, Z], [(Z,)], [(Z, Z, Z)], [(Z, Z[:3])], [(Z[:3], Z)], [(Z, Z[:, :5])], [(Z, None)], [(None, Z)],
    "guides", 3, {0: (Z, Z)}, [(Z, Z.long())], [(Z, Z.clone().requires_grad_())], [(Z.to("meta"), Z)],
    [(Z, Z.to_sparse())], [(Z, Z), (Z, Z[0])], [("z", "z")],
)  # fmt: skip
NOT_LOGITS: tuple[Any, ...] = (
    Z, Z[:, 0], torch.ones(B, B).long(), torch.ones(B, B + 1), [[1.0]], 1.0, torch.ones(B, B, device="meta"),
    torch.ones(B, B).to_sparse(), torch.ones(B, B, requires_grad=True), torch.ones(B, B, dtype=torch.complex64),
)  # fmt: skip
NOT_LISTS: tuple[Any, ...] = (
    PTR, [PTR], (PTR, IDS, IDS), (None, IDS), (PTR, None), (PTR[:-1], IDS), (PTR[None], IDS), (PTR, IDS[None]),
    (PTR.double(), IDS), (PTR, IDS.float()), (PTR > 0, IDS), (PTR.tolist(), IDS.tolist()), "lists", 3, {0: PTR, 1: IDS},
    (PTR, IDS[:3]), (PTR + 1, IDS), (-PTR, IDS), (PTR.flip(0), IDS), (PTR * 2**40, IDS), (NONE, IDS),
    (PTR, IDS - 1), (PTR, IDS + 1), (PTR, IDS * 2**60), (PTR, IDS.flip(0)), (PTR.to("meta"), IDS),
    (PTR, IDS.to("meta")), (PTR.to_sparse(), IDS), (PTR, IDS.to_sparse()), (np.arange(B + 1), np.arange(B)),
    With((torch.tensor([0, 2, 2, 2, 2]), torch.tensor([5, 5])), {"z2": torch.cat([Z, Z])}),
    With((torch.tensor([0, 1, 1, 1, 1]), torch.tensor([8])), {"z2": torch.cat([Z, Z])}),
)  # fmt: skip
NOT_DIRECTIONS: tuple[Any, ...] = (
    None, "qd", 3, (), ["qq"], ["qd", "qd"], ["qd", "xy"], ["qd", None], ["qd", 1], {"qd": 1}, torch.ones(2), ("QD",),
    With(["qd", "dd"], {"z2": torch.cat([Z, Z[:1]])}),
)  # fmt: skip
WEIGHTED_GUIDES: tuple[Any, ...] = tuple(
    With(v, {"guides": [(Z, Z)]})
    for v in ([], [1, 1], [-1], [math.nan], [0], ["1"], 1.0, torch.ones(1), [True], [1e400])
)
# What may stand beside all others but what EXCLUSIVE says.
FINE: dict[str, Any] = {
    "guides": [(Z, Z)], "guide_weights": [1.0], "guide_logits": torch.zeros(B, B), "symmetric": True, "positives": IDS,
    "hard_negative_weight": 1.0, "negatives": (NONE, IDS[:0]), "directions": ["qd", "qq"],
}  # fmt: skip

# Arguments that every contrastive loss has; the bad values of each.
CONTRASTIVE: dict[str, tuple[Any, ...]] = {
    "z1": NOT_EMBEDDINGS,
    "z2": (*NOT_EMBEDDINGS, Z[:3], Z[:, :5], Z.double()),
    "temperature": (0, -0.1, 0.0, -math.inf, torch.tensor(0.0), torch.tensor(-1.0), *NOT_FINITE, *NOT_NUMBERS),
    "positives": (*NOT_IDS, IDS + 1, IDS - 1, torch.full((B,), 2**62)),
    "query_ids": (*NOT_IDS, IDS),  # one of two
    "key_ids": (*NOT_IDS, IDS),
    "hard_negative_weight": (1.0, torch.tensor(1.0), *NOT_FINITE, *NOT_NUMBERS),
    "exclude_above": (
        torch.tensor(1.0), *NOT_FINITE, *(v for v in NOT_NUMBERS if v is not None), torch.ones(3), torch.ones(B, 1),
        IDS, torch.ones(B, device="meta"), torch.ones(B).to_sparse(), torch.ones(B, dtype=torch.complex64),
    ),
    "exclude_by": NOT_NAMES,
    "positive_margin": (torch.tensor(1.0), 1e7, -1e7, *NOT_FINITE, *NOT_NUMBERS),
    "hardness": (-1.0, -1e-9, 1e7, torch.tensor(1.0), *NOT_FINITE, *NOT_NUMBERS),
    "hardness_mode": (
        *NOT_NAMES, With("hard_negatives", {"hardness": 1.0}),
        With("in_batch_negatives", {"hardness": 1.0, "z2": torch.cat([Z, Z[:1]])}),
    ),
    "guides": NOT_GUIDES,
    "guide_weights": ([1.0], *WEIGHTED_GUIDES),
    "guide_logits": NOT_LOGITS,
    "guide_above": (torch.tensor(1.0), *NOT_FINITE, *NOT_NUMBERS),
    "guide_by": NOT_NAMES,
    "symmetric": NOT_FLAGS,
    "normalize": NOT_FLAGS,
    "validate": NOT_FLAGS,
    "weight": NOT_WEIGHTS,
    "reduction": NOT_NAMES,
    "backend": (*NOT_NAMES, "triton", "cuda"),
}  # fmt: skip
PARTS: dict[str, tuple[Any, ...]] = {
    "negatives": NOT_LISTS,
    "directions": NOT_DIRECTIONS,
    "partition": (
        *NOT_NAMES,
        *(With("per_direction", {"directions": ["qd", name]}) for name in ("qq", "dd")),
    ),
}
for (one, two), _ in EXCLUSIVE.items():
    table = CONTRASTIVE if one in CONTRASTIVE else PARTS
    with_guides = {"guides": FINE["guides"]} if one == "guide_weights" else {}
    table[one] = (*table[one], With(FINE[one], {two: FINE[two], **with_guides}))
SIGMOID: dict[str, tuple[Any, ...]] = {
    **{n: CONTRASTIVE[n] for n in ("z1", "z2", "query_ids", "key_ids", "normalize", "validate", "weight", "reduction",
    "backend")},
    "positives": (
        *(v for v in CONTRASTIVE["positives"] if not isinstance(v, With)), With(IDS, {"query_ids": IDS, "key_ids": IDS}),
    ),
    "scale": (0, -0.1, -10, 1e7, torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(1e7), *NOT_FINITE, *NOT_NUMBERS),
    "bias": (1e7, -1e7, torch.tensor(-1e7), *NOT_FINITE, *NOT_NUMBERS),
}  # fmt: skip
SUPCON: dict[str, tuple[Any, ...]] = {
    **{n: CONTRASTIVE[n] for n in ("temperature", "normalize", "validate", "weight", "reduction", "backend")},
    "z1": NOT_EMBEDDINGS,
    "z2": (Z, *(With(v, {"ids2": IDS}) for v in CONTRASTIVE["z2"])),  # without ids2, and what is wrong with them
    "ids1": (None, *NOT_IDS),
    "ids2": (IDS, *(With(v, {"z2": Z}) for v in (None, *NOT_IDS))),
    "inside": NOT_FLAGS,
}
LOGSUM: dict[str, tuple[Any, ...]] = {
    **{n: tuple(v for v in CONTRASTIVE[n] if not isinstance(v, With)) for n in ("z1", "temperature", "positives",
    "query_ids", "key_ids", "exclude_above", "exclude_by", "normalize", "validate", "backend")},
    "z2": (*NOT_EMBEDDINGS, Z[:, :5], Z.double(), With(Z[:3], {"include_positive": False})),
    "include_positive": NOT_FLAGS,
}  # fmt: skip
DISTILLATION: dict[str, tuple[Any, ...]] = {
    "teachers": NOT_TEACHERS,
    "teacher_logits": (
        Z,
        Z[:, 0],
        torch.ones(B, B).long(),
        [[1.0]],
        1.0,
        torch.ones(B, B, device="meta"),
        torch.ones(B, B).to_sparse(),
    ),
    "teacher_weights": ([], [1, 1], [-1], [math.nan], [0], ["1"], 1.0, torch.ones(1), [True], [math.inf]),
    **{
        name: (0, -1.0, torch.tensor(1.0), *NOT_FINITE, *NOT_NUMBERS)
        for name in ("student_temperature", "teacher_temperature", "group_temperature")
    },
    "group_p": (0, -0.5, 1.5, torch.tensor(0.5), *NOT_FINITE, *(v for v in NOT_NUMBERS if v is not None)),
    "group_size": (0, -1, 1.5, True, "3", torch.tensor(3)),
    "span": ((0, 0), (2, 1), (0, B), (-1, 2), (0,), (0, 1, 2), (0.5, 2), "12", 3, (0, True), [None, 1]),
    "shuffle": NOT_NAMES,
    "divergence": NOT_NAMES,
    "seed": NOT_SEEDS,
}
LAYER: dict[str, tuple[Any, ...]] = {
    "x": (
        None,
        [[1.0]],
        Z[:, :5],
        Z.long(),
        Z.to_sparse(),
        Z.double(),
        torch.tensor(1.0),
        Z.to("meta"),
        np.ones((B, D)),
    ),
    "weight": (
        None,
        torch.ones(OUT, D).double(),
        torch.ones(D),
        torch.ones(OUT, D, 1),
        torch.ones(OUT, D).long(),
        torch.ones(OUT, D).to_sparse(),
    ),
    "bias": (
        torch.ones(OUT + 1),
        torch.ones(OUT).double(),
        [1.0],
        1.0,
        torch.ones(1, OUT),
        torch.ones(OUT, device="meta"),
    ),
    "mask": NOT_MASKS,
    "backend": (*NOT_NAMES, "triton", "cuda"),
}
ANGULAR = ("z1", "z2", "temperature", "positives", "query_ids", "key_ids", "weight", "reduction", "backend", "validate")
NOT_RUN: dict[str, dict[str, tuple[Any, ...]]] = {
    "infonce": CONTRASTIVE | PARTS,
    "focal": CONTRASTIVE | PARTS | {"m": (*NOT_FINITE, *NOT_NUMBERS)},
    "logsum": LOGSUM,
    "sigmoid": SIGMOID,
    "supcon": SUPCON,
    "uniformity": {
        "x": (*(v for v in NOT_EMBEDDINGS if getattr(v, "is_meta", False) is False), Z[:1]), "t": (0, -1.0,
        torch.tensor(2.0), *NOT_FINITE, *NOT_NUMBERS), "normalize": NOT_FLAGS,
        "backend": (*NOT_NAMES, "triton", "cuda"),
    },
    "alignment": {
        "x": NOT_EMBEDDINGS, "y": (*NOT_EMBEDDINGS, Z[:3], Z[:, :5], Z.double()), "normalize": NOT_FLAGS,
        "backend": (*NOT_NAMES, "triton", "cuda"),
    },
    "distill": {"z": NOT_EMBEDDINGS} | DISTILLATION | {n: CONTRASTIVE[n] for n in ("normalize", "weight", "reduction",
    "backend")},
    "distillcse": {n: tuple(v for v in values if not isinstance(v, With) or not v.others.keys() & PARTS.keys())
    for n, values in CONTRASTIVE.items()} | DISTILLATION | {"m": (*NOT_FINITE, *(v for v in NOT_NUMBERS if v is not None)),
    "distill_weight": (torch.tensor(1.0), *NOT_FINITE, *NOT_NUMBERS)},
    "adapacse": {n: v for n, v in CONTRASTIVE.items() if n in ANGULAR} | {
        "m": (-0.1, 1.6, torch.tensor(0.3), *NOT_FINITE, *NOT_NUMBERS), "guides": NOT_GUIDES,
        "guide_weights": ([1], 1.0, torch.ones(1)), "guide_logits": (None, *NOT_LOGITS),
    },
    "masked_linear": LAYER,
    "SparseLinear": {
        "mask": [v for v in NOT_MASKS if v is not None], "pattern": (*NOT_NAMES, "2:4"), "backend": NOT_NAMES,
        "x": LAYER["x"],
    },
}  # fmt: skip
VALID: dict[str, Callable[[], dict[str, Any]]] = {
    "infonce": lambda: dict(z1=Z, z2=Z),
    "focal": lambda: dict(z1=Z, z2=Z),
    "logsum": lambda: dict(z1=Z, z2=Z),
    "sigmoid": lambda: dict(z1=Z, z2=Z),
    "supcon": lambda: dict(z1=Z, ids1=IDS),
    "adapacse": lambda: dict(z1=Z, z2=Z, guide_logits=torch.ones(B, B)),
    "uniformity": lambda: dict(x=Z),
    "alignment": lambda: dict(x=Z, y=Z),
    "distill": lambda: dict(z=Z, teachers=[Z]),
    "distillcse": lambda: dict(z1=Z, z2=Z, teachers=[Z]),
    "masked_linear": lambda: dict(x=Z, weight=torch.ones(OUT, D), mask=torch.ones(OUT, D).bool(), bias=torch.ones(OUT)),
    "SparseLinear": lambda: dict(x=Z, mask=torch.ones(OUT, D).bool()),
}
# Another name under which the same is wrong: what an argument has to fit.
ALSO = {"z1": ("z2",), "z2": ("z1", "ids2"), "x": ("y", "weight"), "y": ("x",), "query_ids": ("key_ids",),
"key_ids": ("query_ids",), "weight": ("x",), "z": ("teachers",),
"ids1": ("z1",), "ids2": ("z2",), "partition": ("directions",), "guide_weights": ("guides",)}  # fmt: skip


def describe(c: Any) -> dict[str, Any]:
    op = c.pick(tuple(NOT_RUN))
    argument = c.pick(tuple(NOT_RUN[op]))
    return dict(
        op=op,
        argument=argument,
        value=c.whole(0, len(NOT_RUN[op][argument]) - 1),
        backend=c.pick(("cpu", "torch", "reference", "auto")),
        module=c.chance(0.3),
    )


def call(op: str, given: dict[str, Any], module: bool) -> None:
    if op == "SparseLinear":
        x, mask = given.pop("x"), given.pop("mask")
        SparseLinear(D, OUT, mask=mask, **given)(x)
    elif module and op in MODULES:
        batch = MODULES[op].batch
        MODULES[op](**{n: v for n, v in given.items() if n not in batch})(
            **{n: v for n, v in given.items() if n in batch}
        )
    else:
        FUNCTIONS[op](**given)


def run(d: dict[str, Any]) -> None:
    """Make the call; Fault where it is not refused by an error that names the argument."""
    name = d["argument"]
    bad = NOT_RUN[d["op"]][name][d["value"]]
    others: dict[str, Any] = {}
    if isinstance(bad, With):
        bad, others = bad.value, bad.others
    given = VALID[d["op"]]() | {"backend": d["backend"]} | {name: bad} | others
    if name == "teacher_logits":
        given.pop("teachers")
    what = f"{d['op']}({name}={bad!r:.80}{''.join(f', {n}={v!r:.40}' for n, v in others.items())})"
    try:
        call(d["op"], given, d["module"])
    except (TypeError, ValueError, RuntimeError) as error:
        if type(error) not in (TypeError, ValueError, RuntimeError):
            raise Fault(f"{what} raised {type(error).__name__}: {error}") from error
        if not any(n in str(error) for n in (name, *ALSO.get(name, ()))):
            raise Fault(f"{what} raised {type(error).__name__} without naming it: {error}") from error
    except Exception as error:
        raise Fault(f"{what} raised {type(error).__name__}: {error}") from error
    else:
        raise Fault(f"{what} was taken")
