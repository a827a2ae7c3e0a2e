"""A batch that ranks share: what each holds, what it gets, and what one process gets of the joined batch.

The losses' convention (pycse/distributed/calls.py) is spelled out here once more, from the rows' losses of the float64
reference: a test of the ranks is one of the sums over them, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import pycse

UPSTREAM = (1.0, 0.5, 2.0, 1.5)  # by rank, where they differ
PAIRS = {
    "infonce": pycse.fused_infonce, "focal": pycse.fused_focal_infonce, "sigmoid": pycse.fused_sigmoid,
    "adapacse": pycse.fused_adapacse, "log-sums": pycse.logsumexp_similarities, "distillcse": pycse.fused_distillcse,
}  # fmt: skip
BANDS = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 3e-2}


@dataclass
class Shared:
    rows: tuple[int, ...]  # of each rank
    loss: str = "infonce"
    keys: tuple[int, ...] = ()  # of each rank, where they are not (1 + hard) times its rows
    hard: int = 0  # negatives a row
    options: dict[str, Any] = field(default_factory=dict)
    batch: tuple[str, ...] = ()  # of: weight, ids, positives, exclude, guides, lists, queue
    tensors: bool = False  # numbers that are trained
    upstream: bool = False  # differs from rank to rank
    dtype: torch.dtype = torch.float32
    backend: str = "cpu"
    D: int = 16
    without: tuple[str, ...] = ()  # gradients that nobody wants
    exchange: str = "gather"
    temperatures: tuple[float, ...] = ()  # one a length

    def __str__(self) -> str:
        parts = [self.loss, "x".join(map(str, self.rows)), str(self.dtype)[6:], self.backend, *self.batch]
        parts += [f"{k}={v}" for k, v in self.options.items()] + [f"hard{self.hard}"] * bool(self.hard)
        parts += [f"keys{self.keys}"] * bool(self.keys) + ["tensors"] * self.tensors + ["upstream"] * self.upstream
        parts += [self.exchange] * (self.exchange != "gather") + ["temperatures"] * bool(self.temperatures)
        return "-".join(parts) + "".join(f"-no {name}" for name in self.without)

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def B(self) -> int:
        return sum(self.rows)

    @property
    def N(self) -> int:
        return sum(self.keys) if self.keys else (1 + self.hard) * self.B

    def begin(self, rank: int) -> int:
        return sum(self.rows[:rank])

    def of_rows(self, t: Tensor, rank: int) -> Tensor:
        return t[self.begin(rank) : self.begin(rank) + self.rows[rank]]

    def of_keys(self, t: Tensor, rank: int) -> Tensor:
        """A rank's keys in the joined batch's, which has its hard negatives behind all positives."""
        if self.keys:
            first = sum(self.keys[:rank])
            return t[first : first + self.keys[rank]]
        grouped = t.view(1 + self.hard, self.B, *t.shape[1:])
        return grouped[:, self.begin(rank) : self.begin(rank) + self.rows[rank]].flatten(0, 1)

    def tensors_of(self) -> dict[str, Tensor]:
        """The joined batch in float64, with the dtype's values."""
        g = torch.Generator().manual_seed(self.B + 7 * self.N)
        new = lambda *n: torch.randn(*n, generator=g, dtype=torch.float64).to(self.dtype).double()  # noqa: E731
        ints = lambda n: torch.randint(0, max(2, self.B // 2), (n,), generator=g)  # noqa: E731
        t: dict[str, Tensor] = {"z1": new(self.B, self.D), "z2": new(self.N, self.D)}
        if self.loss in ("supcon", "uniformity", "distill"):
            del t["z2"]
        if not self.keys and "z2" in t:
            t["z2"][: self.B] = (t["z2"][: self.B] + t["z1"]).to(self.dtype).double()
        if "weight" in self.batch:
            t["weight"] = torch.rand(self.B, generator=g, dtype=torch.float64) + 0.1
        if "ids" in self.batch or self.loss.startswith("supcon"):
            t["query_ids"], t["key_ids"] = ints(self.B), ints(self.N)
        if "exclude" in self.batch:
            t["exclude_above"] = torch.rand(self.B, generator=g, dtype=torch.float64) * 0.2 - 0.1
        if "guides" in self.batch:
            t["guide q"], t["guide k"] = new(self.B, 8), new(self.N, 8)
        if self.loss.startswith("distill"):
            t["teacher 0"] = (t["z1"][:, :8] + 0.5 * new(self.B, 8)).to(self.dtype).double()
            t["teacher 1"] = (t["z1"][:, 4:] + 0.5 * new(self.B, self.D - 4)).to(self.dtype).double()
        if "queue" in self.batch:
            t["queue"] = new(5, self.D)
            if "ids" in self.batch:
                t["queue ids"] = ints(5)
        return t

    def positives_of(self, rank: int) -> Tensor:
        """A rank's own, among its own keys."""
        n = self.keys[rank] if self.keys else (1 + self.hard) * self.rows[rank]
        return (torch.arange(self.rows[rank]) * 5 + 2) % max(n, 1)

    def joined_positives(self) -> Tensor:
        at = torch.arange(self.N)
        return torch.cat([self.of_keys(at, rank)[self.positives_of(rank)] for rank in range(self.size)])

    def listed_of(self, rank: int) -> tuple[Tensor, Tensor]:
        """A rank's row i lists i % 2 or 2 of its hard negatives."""
        b, ptr, index = self.rows[rank], [0], []
        for i in range(b):
            mine = [b + i] if i % 2 else [b + i, b + (i + 1) % b]
            index += mine if b > 1 else mine[:1]
            ptr.append(len(index))
        return torch.tensor(ptr), torch.tensor(index, dtype=torch.int64)

    def joined_lists(self) -> tuple[Tensor, Tensor]:
        at, ptr, index = torch.arange(self.N), [0], []
        for rank in range(self.size):
            own_ptr, own_index = self.listed_of(rank)
            index.append(self.of_keys(at, rank)[own_index])
            ptr += (own_ptr[1:] + ptr[-1]).tolist()
        return torch.tensor(ptr), torch.cat(index)


NUMBERS = {"sigmoid": {"scale": 8.0, "bias": -3.0}, "focal": {"temperature": 0.1, "m": 0.3}}


def _called(
    case: Shared, t: dict[str, Tensor], numbers: dict[str, Any], more: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The loss by the public function on these tensors, and its parts where they are asked for."""
    result = _result(case, t, numbers, more)
    if not case.options.get("parts"):
        return getattr(result, "loss", result), None
    return result[0], torch.cat(result[1:])  # distillcse: contrastive, distillation


def _result(case: Shared, t: dict[str, Tensor], numbers: dict[str, Any], more: dict[str, Any]) -> Any:
    options = dict(case.options) | more
    for name in ("weight", "exclude_above", "positives"):
        if name in t:
            options[name] = t[name]
    if case.loss == "uniformity":
        return pycse.uniformity(t["z1"], **options)
    if case.loss == "alignment":
        return pycse.alignment(t["z1"], t["z2"], **options)
    if case.loss == "supcon":
        return pycse.fused_supcon(t["z1"], t["query_ids"], **numbers, **options)
    if case.loss == "supcon pairs":
        return pycse.fused_supcon(t["z1"], t["query_ids"], t["z2"], t["key_ids"], **numbers, **options)
    if "query_ids" in t:
        options |= {"query_ids": t["query_ids"], "key_ids": t["key_ids"]}
    if "guide q" in t:
        options["guides"] = [(t["guide q"], t["guide k"])]
    if case.loss.startswith("distill"):
        teachers = [t["teacher 0"], t["teacher 1"]]
        if case.loss == "distill":
            return pycse.fused_distill(t["z1"], teachers, **options)
        return pycse.fused_distillcse(t["z1"], t["z2"], teachers, **numbers, **options)
    return PAIRS[case.loss](t["z1"], t["z2"], **numbers, **options)


def _leaves(case: Shared, t: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What has gradients, and the numbers."""
    given = {} if case.loss in ("distill", "uniformity", "alignment") else NUMBERS.get(case.loss, {"temperature": 0.1})
    if case.temperatures:
        given = given | {"temperature": list(case.temperatures)}
    numbers: dict[str, Any] = dict(given)
    leaves = {
        name: t[name].requires_grad_() for name in ("z1", "z2", "weight") if name in t and name not in case.without
    }
    if case.tensors:
        for name, value in given.items():
            numbers[name] = leaves[name] = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    return leaves, numbers


def on_rank(rank: int, group: Any, case: Shared) -> dict[str, Tensor]:
    """What a rank gets: its loss and gradients."""
    full = case.tensors_of()
    wide = ("weight", "exclude_above")
    t = {}
    for name, x in full.items():
        if name.startswith("queue"):
            continue
        by_keys = name in ("z2", "key_ids", "guide k")
        x = (case.of_keys if by_keys else case.of_rows)(x, rank)
        t[name] = x.clone().to(case.dtype) if x.is_floating_point() and name not in wide else x.clone()
    more: dict[str, Any] = {"group": group, "backend": case.backend}
    if case.loss in ("infonce", "focal", "log-sums"):
        more["exchange"] = case.exchange
    if "queue" in full:
        t["z2"] = torch.cat((t["z2"], full["queue"].to(case.dtype)))
        more["replicated_keys"] = len(full["queue"])
        if "key_ids" in t:
            t["key_ids"] = torch.cat((t["key_ids"], full["queue ids"]))
    if "positives" in case.batch:
        t["positives"] = case.positives_of(rank)
    if "lists" in case.batch:
        more["negatives"] = case.listed_of(rank)
    if case.loss.startswith("distill"):
        more["seed"] = 1234 + rank  # rank 0's counts
    t = {name: x.detach() for name, x in t.items()}
    leaves, numbers = _leaves(case, t)
    loss, parts = _called(case, t, numbers, more)
    if leaves:
        u = torch.ones_like(loss) * (UPSTREAM[rank] if case.upstream else 1)
        if loss.dim():
            u = u * torch.linspace(0.5, 2, case.B, dtype=u.dtype)[case.begin(rank) : case.begin(rank) + case.rows[rank]]
        loss.backward(u)
    result = {"loss": loss.detach().double(), **{name: leaf.grad.double() for name, leaf in leaves.items()}}
    return result if parts is None else result | {"parts": parts.double()}


def in_one(case: Shared) -> list[dict[str, Tensor]]:
    """The same by the reference in float64, from the joined batch."""
    t = case.tensors_of()
    more: dict[str, Any] = {"backend": "reference"}
    if "queue" in t:
        t["z2"] = torch.cat((t["z2"], t.pop("queue")))
        if "key_ids" in t:
            t["key_ids"] = torch.cat((t["key_ids"], t.pop("queue ids")))
    if "positives" in case.batch:
        t["positives"] = case.joined_positives()
    elif case.loss == "infonce" and case.keys:
        at = torch.arange(case.N)
        t["positives"] = torch.cat([case.of_keys(at, r)[: case.rows[r]] for r in range(case.size)])
    if "lists" in case.batch:
        more["negatives"] = case.joined_lists()
    if case.loss.startswith("distill"):
        more["seed"] = 1234
    leaves, numbers = _leaves(case, t)
    reduction = case.options.get("reduction", "none" if case.loss == "log-sums" else "mean")
    weight = t.pop("weight", None)
    W = case.size
    upstream = UPSTREAM if case.upstream else (1.0,) * W
    parts = None
    if case.loss in ("uniformity", "alignment"):
        value, _ = _called(case, t, numbers, more)
        if case.loss == "alignment":
            rows = 2 - 2 * torch.nn.functional.cosine_similarity(t["z1"], t["z2"])
            losses = [case.of_rows(rows, r).sum() * W / case.B for r in range(W)]
        else:
            losses = [value] * W
    else:
        if case.loss != "log-sums":
            more["reduction"] = "none"
        total = case.B if weight is None else weight.sum()

        def by_rank(rows: Tensor) -> list[Tensor]:
            rows = rows if weight is None else rows * weight
            own = [case.of_rows(rows.t(), r).t() for r in range(W)]  # (K, B) of parts
            if reduction == "none":
                return own
            return [x.sum(-1) * (W / total if reduction == "mean" else W) for x in own]

        rows, parts = _called(case, t, numbers, more)
        losses = by_rank(rows)
    if reduction == "none" and losses[0].dim():
        scale = torch.linspace(0.5, 2, case.B, dtype=torch.float64)
        everything = sum((x * case.of_rows(scale, r)).sum() * upstream[r] for r, x in enumerate(losses))
    else:
        everything = sum(x * u for x, u in zip(losses, upstream))
    if leaves:
        everything.backward()
    result = []
    for r in range(W):
        one = {"loss": losses[r].detach()} | ({} if parts is None else {"parts": by_rank(parts)[r].detach()})
        for name, leaf in leaves.items():
            g = leaf.grad
            if name == "z2":
                one[name] = case.of_keys(g[: case.N], r)
                if "queue" in case.batch:
                    continue  # each rank has its own part of the queue's: looked at below
            else:
                one[name] = case.of_rows(g, r) if name in ("z1", "weight") else g / W
        result.append(one)
    return result


def compare(case: Shared, ours: list[dict[str, Tensor]]) -> None:
    """Raises AssertionError where a rank is off."""
    truth = in_one(case)
    band = BANDS[case.dtype]
    for name in truth[0]:
        # A number's gradient is a sum over pairs that cancel; in bfloat16 each is off by l' 2^-9.
        least = 10.0 if case.dtype == torch.bfloat16 and name not in ("loss", "parts", "z1", "z2", "weight") else 1e-3
        scale = torch.cat([one[name].flatten() for one in truth]).abs().max().clamp_min(least)
        for rank, (one, right) in enumerate(zip(ours, truth)):
            value = one[name][: len(right[name])] if name == "z2" else one[name]
            assert value.shape == right[name].shape, (str(case), name, rank, value.shape, right[name].shape)
            off = ((value - right[name]).abs().max() / scale).item() if value.numel() else 0.0
            assert off <= band, f"{case}: {name} of rank {rank} is off by {off:.1e}, allowed {band:.0e}"
