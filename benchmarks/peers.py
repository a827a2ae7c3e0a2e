"""What every workload is timed beside: pycse itself, eager PyTorch, other packages, and the floor of its own GEMMs.

A peer says which workloads it covers and builds its computation from their inputs. What is not installed, needs a GPU
that is not there, or would not fit into memory is left out with its reason. ``parity`` holds everything that computes
the same loss against the formula in float32; what computes another loss says how it differs.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pycse
from benchmarks.formulas import BIAS, CHUNK, SCALE, TAU, TEACHER, classes, formula, positives, reference
from benchmarks.internals import contrastive_rows, distill_rows
from benchmarks.limits import products, yardstick
from benchmarks.measure import available_memory
from benchmarks.workloads import CONTRASTIVE, LISTED, ROWS, SIDES, Inputs, Workload, lengths
from pycse.sparse import SparseLinear

OVERHEAD = 256 << 20  # of a process beyond its tensors
ON_A_CPU = (512, 1024, 2048)  # rows of a floor's panels
PANELS = (*ON_A_CPU, 2304, 4096, 8192)  # 2304: whole rounds of an H200's 132 multiprocessors
COEFFICIENT = 1e-6  # of distillation rows timed alone: small, so that G is small as the next S
ALLOWED = {"fp32": 1e-4, "bf16": 0.1}  # relative difference of norms to the formula in float32


class ParityError(AssertionError):
    """Something computes another result than it says."""


@dataclass
class Alternative:
    """``output`` as a function of ``leaves``, which gradients are taken of. Without leaves nothing is compared: a
    floor."""

    output: Callable[[], Any]
    leaves: list[Tensor]
    upstream: Tensor | None = None
    own_backward: bool = False  # output() makes the gradients too
    values: Callable[[], list[Tensor]] | None = None  # where output() cannot be called for its value

    def step(self, backward: bool) -> Callable[[], Any]:
        """What is timed."""
        if not self.leaves or self.values is not None:
            return self.output

        def forward() -> Any:
            with torch.no_grad():
                return self.output()

        def both() -> Any:
            for leaf in self.leaves:
                leaf.grad = None
            y = self.output()
            if not self.own_backward:
                y.backward(self.upstream)
            return y

        return both if backward else forward

    def compared(self, backward: bool) -> list[Tensor]:
        """The output, and with ``backward`` the gradients."""
        if self.values is not None:
            return self.values()
        y = self.step(backward)().detach().clone()
        gradients = [leaf.grad.clone() for leaf in self.leaves if leaf.grad is not None] if backward else []
        for leaf in self.leaves:
            leaf.grad = None
        return [y, *gradients]


# --- pycse


def _pycse(w: Workload, x: Inputs, backend: str = "auto") -> Alternative:
    if w.op == "distillcse":
        z1, z2 = x.leaves
        options: dict[str, Any] = {"shuffle": w.shuffle, "seed": 1, "backend": backend}
        return Alternative(lambda: pycse.fused_distillcse(z1, z2, x.teachers, **options).loss, x.leaves)
    if w.op == "sparse":
        weight, mask = x.leaves[1], x.mask
        assert mask is not None
        dense = torch.nn.Linear(w.D, w.out, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            dense.weight.copy_(weight)
            dense.bias.copy_(x.leaves[2])
        layer = SparseLinear.from_dense(dense, mask, w.pattern, backend).train(w.backward)
        return Alternative(lambda: layer(x.leaves[0]), [x.leaves[0], layer.weight, layer.bias], x.upstream)
    if w.op in ROWS:
        return _rows(w, x)
    loss = {
        "infonce": lambda: pycse.fused_infonce(*x.leaves, backend=backend),
        "focal": lambda: pycse.fused_focal_infonce(*x.leaves, backend=backend),
        "symmetric": lambda: pycse.fused_infonce(*x.leaves, symmetric=True, backend=backend),
        "sigmoid": lambda: pycse.fused_sigmoid(*x.leaves, SCALE, BIAS, backend=backend),
        "supcon": lambda: pycse.fused_supcon(*x.leaves, classes(x.leaves[0]), temperature=TAU, backend=backend),
        "uniformity": lambda: pycse.uniformity(*x.leaves, backend=backend),
        "guided": lambda: pycse.fused_infonce(*x.leaves, guides=[(x.teachers[0], x.teachers[1])], backend=backend),
        "directions": lambda: pycse.fused_infonce(*x.leaves, directions=("qd", "qq", "dq", "dd"), backend=backend),
        "lists": lambda: pycse.fused_infonce(*x.leaves, negatives=_lists(w), backend=backend),
        "matryoshka": lambda: pycse.fused_infonce(*x.leaves, dims=lengths(w.D), backend=backend),
    }
    return Alternative(loss[w.op], x.leaves)


def _separate(w: Workload, x: Inputs) -> Alternative:
    z1, z2 = x.leaves
    return Alternative(lambda: sum(pycse.fused_infonce(z1[:, :d], z2[:, :d]) for d in lengths(w.D)), x.leaves)


def _lists(w: Workload) -> tuple[Tensor, Tensor]:
    """Row i's keys k N + i, k >= 1."""
    index = torch.arange(w.N)[:, None] + w.N * torch.arange(1, 1 + LISTED)
    return torch.arange(w.N + 1) * LISTED, index.flatten()


def _rows(w: Workload, x: Inputs) -> Alternative:
    """A row kernel writes over its panel. Timed on its own output again and again: its loops do not depend on values,
    and G is small and stays so (a copy in between would take as long as the kernel)."""
    S = x.leaves[0]
    if w.op == "contrastive-rows":
        run, losses = contrastive_rows(S)
    else:
        run, losses = distill_rows(S, x.teachers[0], w.shuffle, COEFFICIENT)
    first, panel = S.detach(), S.detach().clone()

    def values() -> list[Tensor]:
        panel.copy_(first)
        f = run(panel)
        return [losses.sum(), panel if f is None else panel * f[:, None]]

    return Alternative(lambda: run(panel), [S], values=values)


# --- plain PyTorch


def _eager(w: Workload, x: Inputs) -> Alternative:
    f = formula(w, x)
    return Alternative(lambda: f(*x.leaves), x.leaves, x.upstream)


def _compile(w: Workload, x: Inputs) -> Alternative:
    torch._dynamo.reset()  # a workload's shapes are its own: no dynamic ones
    f = torch.compile(formula(w, x))
    return Alternative(lambda: f(*x.leaves), x.leaves, x.upstream)


# --- other packages; their fused path where they have one, embeddings normalised as they expect


def _linear_cross_entropy(w: Workload, x: Inputs) -> Alternative:
    z1, z2 = x.leaves
    target, options = positives(z1, 0), torch.nn.LinearCrossEntropyOptions()
    return Alternative(
        lambda: F.linear_cross_entropy(F.normalize(z1, dim=1) / TAU, F.normalize(z2, dim=1), target, options=options),
        x.leaves,
    )


def _directions(w: Workload) -> dict[str, Any]:
    if w.op in ("infonce", "matryoshka"):
        return {}
    if w.op == "directions":
        return {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}
    return {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def _encoder() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Identity())  # the losses take embeddings here


def _mnrl(w: Workload, x: Inputs) -> Alternative:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss: Any = MultipleNegativesRankingLoss(_encoder(), scale=1 / TAU, **_directions(w))
    if w.op == "matryoshka":  # as MatryoshkaLoss puts it around
        cut = lambda d: [F.normalize(z[:, :d], dim=1) for z in x.leaves]  # noqa: E731
        return Alternative(lambda: sum(loss.compute_loss_from_embeddings(cut(d), None) for d in lengths(w.D)), x.leaves)
    return Alternative(lambda: loss.compute_loss_from_embeddings(x.leaves, None), x.leaves)


def _cached_mnrl(w: Workload, x: Inputs) -> Alternative:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    loss: Any = CachedMultipleNegativesRankingLoss(_encoder(), scale=1 / TAU, mini_batch_size=512, **_directions(w))
    z1, z2 = x.leaves
    return Alternative(
        lambda: loss.calculate_loss([[z1], [z2]], with_backward=torch.is_grad_enabled()), x.leaves, own_backward=True
    )


def _ntxent(w: Workload, x: Inputs) -> Alternative:
    from pytorch_metric_learning.losses import NTXentLoss

    loss, (z1, z2) = NTXentLoss(TAU), x.leaves
    target = positives(z1, 0)
    other = target.clone()  # the same tensor would say: one set of embeddings, no pairs on the diagonal
    return Alternative(lambda: loss(z1, target, ref_emb=z2, ref_labels=other), x.leaves)


def _supcon(w: Workload, x: Inputs) -> Alternative:
    from pytorch_metric_learning.losses import SupConLoss

    loss, (z,) = SupConLoss(TAU), x.leaves
    return Alternative(lambda: loss(z, classes(z)), x.leaves)


def _open_clip() -> ModuleType:
    """open_clip/loss.py alone: the package imports torchvision, which its losses do not use."""
    found = importlib.util.find_spec("open_clip")
    assert found is not None and found.origin is not None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(found.origin).parent / "loss.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _clip(w: Workload, x: Inputs) -> Alternative:
    loss = _open_clip().ClipLoss(cache_labels=True)
    return Alternative(lambda: loss(*(F.normalize(z, dim=1) for z in x.leaves), 1 / TAU), x.leaves)


def _siglip_of_open_clip(w: Workload, x: Inputs) -> Alternative:
    loss = _open_clip().SigLipLoss(cache_labels=True)
    return Alternative(lambda: loss(*(F.normalize(z, dim=1) for z in x.leaves), SCALE, BIAS), x.leaves)


def _distill_clip(w: Workload, x: Inputs) -> Alternative:
    loss, (z1, z2) = _open_clip().DistillClipLoss(cache_labels=True), x.leaves
    teacher = F.normalize(x.teachers[0], dim=1)

    def output() -> Tensor:
        a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        return sum(loss(a, b, 1 / TAU, teacher, teacher, 1 / TEACHER))  # type: ignore[return-value]

    return Alternative(output, x.leaves)


def _torch_sparse(layout: str) -> Callable[[Workload, Inputs], Alternative]:
    def build(w: Workload, x: Inputs) -> Alternative:
        weight, bias, b = x.leaves[1].detach(), x.leaves[2].detach(), SIDES[w.pattern]
        kept: Tensor = weight.to_sparse_csr() if layout == "csr" else weight.to_sparse_bsr((b, b))
        return Alternative(lambda: (kept @ x.leaves[0].t()).t() + bias, x.leaves)

    return build


# --- on a GPU


def _memeff(w: Workload, x: Inputs) -> Alternative:
    import memeff

    if w.op == "symmetric":
        loss = memeff.MemoryEfficientCLIPLoss(TAU, stable=False)  # stable=True scales the gradient by another factor
    else:
        loss = memeff.MemoryEfficientQwen3Loss(
            temperature=TAU, margin=2.0, stable=False, use_qq_negatives=False, use_dd_negatives=False
        )
    return Alternative(lambda: loss(*x.leaves), x.leaves)


def _siglip(w: Workload, x: Inputs) -> Alternative:
    from siglip_kernel import fused_siglip_loss

    log_scale, bias = (torch.tensor(v, device=x.leaves[0].device) for v in (-math.log(TAU), -10.0))
    return Alternative(lambda: fused_siglip_loss(*(F.normalize(z, dim=1) for z in x.leaves), log_scale, bias), x.leaves)


def _inf_cl(w: Workload, x: Inputs) -> Alternative:
    from inf_cl import cal_flash_loss

    z1, z2 = x.leaves
    target = positives(z1, 0)
    return Alternative(
        lambda: cal_flash_loss(F.normalize(z1, dim=1), F.normalize(z2, dim=1), target, 1 / TAU).mean(), x.leaves
    )


def _cce(filter_eps: str | None) -> Callable[[Workload, Inputs], Alternative]:
    def build(w: Workload, x: Inputs) -> Alternative:
        from cut_cross_entropy import linear_cross_entropy

        z1, z2 = x.leaves
        target = positives(z1, 0)
        return Alternative(
            lambda: linear_cross_entropy(
                F.normalize(z1, dim=1) / TAU, F.normalize(z2, dim=1), target, filter_eps=filter_eps
            ),
            x.leaves,
        )

    return build


def _liger(w: Workload, x: Inputs) -> Alternative:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    z1, z2 = x.leaves
    target, fused = positives(z1, 0), LigerFusedLinearScaledCrossEntropyFunction
    return Alternative(
        lambda: fused.apply(F.normalize(z1, dim=1), F.normalize(z2, dim=1), target, TAU).mean(), x.leaves
    )


def _stk(w: Workload, x: Inputs) -> Alternative:
    import stk

    kept = stk.ops.to_sparse(x.leaves[1].detach().t().contiguous(), SIDES[w.pattern])
    bias = x.leaves[2].detach()
    return Alternative(lambda: stk.ops.dds(x.leaves[0], kept) + bias, x.leaves)


def _semi_structured(w: Workload, x: Inputs) -> Alternative:
    kept, bias = torch.sparse.to_sparse_semi_structured(x.leaves[1].detach()), x.leaves[2].detach()
    return Alternative(lambda: F.linear(x.leaves[0], kept, bias), x.leaves)


# --- the list


def _among(*ops: str) -> Callable[[Workload], bool]:
    return lambda w: w.op in ops


def _matrices(count: float) -> Callable[[Workload], float]:
    """Bytes of ``count`` matrices of N x N in float32."""
    return lambda w: 0 if w.op in (*ROWS, "sparse") else 4 * count * w.N**2


@dataclass(frozen=True)
class Peer:
    name: str
    covers: Callable[[Workload], bool]
    build: Callable[[Workload, Inputs], Alternative]
    module: str = "torch"
    requirement: str = ""  # what to pip install
    differs: str = ""  # how its loss or gradient differs from the workload's; "" where it is the same
    gpu: bool = False
    memory: Callable[[Workload], float] = lambda w: 0.0  # bytes beyond inputs and gradients

    @property
    def limit(self) -> bool:
        """Not an alternative but a bound."""
        return self.name.startswith("floor") or self.name == "yardstick"

    def missing(self) -> str:
        """Why it cannot run here, "" where it can."""
        if self.gpu and not torch.cuda.is_available():
            return "needs an NVIDIA GPU"
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: pip install {self.requirement}"
        if self.name == "linear-ce" and not hasattr(F, "linear_cross_entropy"):
            return "needs torch >= 2.13"
        return ""


def _floor(c: int, wide: bool = False) -> Callable[[Workload, Inputs], Alternative]:
    return lambda w, x: Alternative(products(w, x, min(c, w.N), wide), [])


def _covers_floor(c: int, wide: bool = False) -> Callable[[Workload], bool]:
    def covers(w: Workload) -> bool:
        gpu = torch.cuda.is_available()
        if w.op not in (*CONTRASTIVE, "directions", "distillcse", "matryoshka", "sigmoid", "uniformity") or (
            wide and not (gpu and w.dtype == "bf16")
        ):
            return False
        if w.N > 8192:
            return c > 512 if gpu else c == (2048 if w.dtype == "bf16" else 1024)
        return c in ON_A_CPU and (c <= w.N and (c < 2048 or w.op in CONTRASTIVE) or c == 512)

    return covers


_ONE_WAY, _BOTH_WAYS, _EITHER = _among("infonce"), _among("symmetric"), _among("infonce", "symmetric")
_SAMPLE = lambda w: w.op == "distillcse" and w.shuffle == "sample"  # noqa: E731


def _of_reference(w: Workload) -> float:
    """Bytes that parity takes: of the formula, in chunks of rows where it can be cut."""
    if not w.timed:
        return 0
    if w.by_rows or (w.op == "symmetric" and not w.huge):
        return 4 * 6 * min(CHUNK, w.N) * w.N * {"directions": 4, "lists": 1 + LISTED}.get(w.op, 1)
    return _matrices(16 if w.op == "distillcse" else 6)(w)


OF_INFONCE = {
    "distillcse": 16 / 6,
    "directions": 4,
    "lists": 1 + LISTED,
    "matryoshka": 5,
}  # an eager peer's matrices, beside InfoNCE's

PYCSE = Peer("pycse", lambda w: True, _pycse, memory=_of_reference)
PEERS = [
    PYCSE,
    Peer("eager", lambda w: w.op not in ROWS, _eager, memory=lambda w: _matrices(6 * OF_INFONCE.get(w.op, 1))(w)),
    Peer(
        "compile", _among(*CONTRASTIVE, "distillcse", "sigmoid", "supcon", "uniformity"), _compile, memory=_matrices(8)
    ),
    Peer("linear-ce", _ONE_WAY, _linear_cross_entropy, requirement="torch>=2.13", memory=_matrices(1)),
    Peer(
        "mnrl",
        _among("infonce", "symmetric", "directions", "matryoshka"),
        _mnrl,
        "sentence_transformers",
        "sentence-transformers",
        memory=lambda w: _matrices(6 * OF_INFONCE.get(w.op, 1))(w),
    ),
    Peer(
        "cached-mnrl",
        _among("infonce", "symmetric", "directions"),
        _cached_mnrl,
        "sentence_transformers",
        "sentence-transformers",
    ),
    Peer(
        "ntxent",
        _ONE_WAY,
        _ntxent,
        "pytorch_metric_learning",
        "pytorch-metric-learning==2.9.0",
        memory=lambda w: 24 * w.N**3,
    ),
    Peer(
        "supcon",
        _among("supcon"),
        _supcon,
        "pytorch_metric_learning",
        "pytorch-metric-learning==2.9.0",
        memory=_matrices(16),
    ),
    Peer("clip", _BOTH_WAYS, _clip, "open_clip", "--no-deps open_clip_torch==3.3.0", memory=_matrices(8)),
    Peer(
        "siglip",
        _among("sigmoid"),
        _siglip_of_open_clip,
        "open_clip",
        "--no-deps open_clip_torch==3.3.0",
        memory=_matrices(6),
    ),
    Peer(
        "distill-clip",
        lambda w: w.op == "distillcse" and w.teachers == 1,
        _distill_clip,
        "open_clip",
        "--no-deps open_clip_torch==3.3.0",
        "two views, both directions, diagonal kept, no shuffle",
        memory=_matrices(16),
    ),
    Peer(
        "pycse-one", _among("matryoshka"), lambda w, x: _pycse(replace(w, op="infonce"), x), differs="the longest alone"
    ),
    Peer("pycse-separate", _among("matryoshka"), _separate),
    Peer("pycse-none", _SAMPLE, lambda w, x: _pycse(replace(w, shuffle="none"), x), differs="no shuffle"),
    Peer(
        "pycse-expected",
        _SAMPLE,
        lambda w, x: _pycse(replace(w, shuffle="expected"), x),
        differs="each group's mean, nothing drawn",
    ),
    Peer(
        "csr",
        lambda w: w.op == "sparse" and w.pattern == "unstructured" and not w.backward and w.dtype == "fp32",
        _torch_sparse("csr"),
    ),
    Peer(
        "bsr",
        lambda w: w.op == "sparse" and w.pattern.startswith("block") and not w.backward and w.dtype == "fp32",
        _torch_sparse("bsr"),
    ),
    Peer("memeff", _EITHER, _memeff, "memeff", "memeff==0.3.1", gpu=True),
    Peer(
        "siglip-kernel",
        lambda w: w.op == "symmetric" or (w.op == "focal" and torch.cuda.is_available()),
        _siglip,
        "siglip_kernel",
        "siglip-kernel==0.1.2",
        "sigmoid of every pair, no softmax",
        gpu=True,
    ),
    Peer("inf-cl", lambda w: w.op == "infonce" and w.D % 256 == 0, _inf_cl, "inf_cl", "inf-cl==1.2.1", gpu=True),
    Peer(
        "cce-exact",
        lambda w: w.op == "infonce" and w.dtype == "bf16",
        _cce(None),
        "cut_cross_entropy",
        "cut-cross-entropy==25.1.1",
        gpu=True,
    ),
    Peer(
        "cce",
        lambda w: w.op == "infonce" and w.dtype == "bf16",
        _cce("high"),
        "cut_cross_entropy",
        "cut-cross-entropy==25.1.1",
        "its default filter drops small gradients",
        gpu=True,
    ),
    Peer("liger", _ONE_WAY, _liger, "liger_kernel", "liger-kernel==0.8.5", gpu=True),
    Peer(
        "stk",
        lambda w: w.op == "sparse" and w.pattern.startswith("block") and not w.backward and w.dtype == "bf16",
        _stk,
        "stk",
        "stanford-stk==0.7.1",
        gpu=True,
    ),
    Peer("semi-structured", lambda w: w.pattern == "2:4", _semi_structured, gpu=True),
    *(
        Peer(
            f"floor-{c}{suffix}",
            _covers_floor(c, bool(suffix)),
            _floor(c, bool(suffix)),
            requirement="torch>=2.9" if suffix else "",
        )
        for suffix in ("", "-wide")
        for c in PANELS
    ),
    Peer("yardstick", _among(*ROWS), lambda w, x: Alternative(yardstick(w, x), [])),
]
NAMES = [peer.name for peer in PEERS]


def on_backend(name: str, shuffle: str = "") -> Peer:
    """pycse by a backend that is not the default one, or also with another shuffle."""
    build = lambda w, x: _pycse(replace(w, shuffle=shuffle or w.shuffle), x, name)  # noqa: E731
    return Peer(f"pycse-{name}{f'-{shuffle}' if shuffle else ''}", PYCSE.covers, build, memory=_of_reference)


def beside(w: Workload, names: list[str], everything: bool) -> tuple[list[Peer], dict[str, str]]:
    """The peers to time beside a workload, pycse first, and why others that cover it are left out.

    ``names`` limits them (none: all); torch.compile takes seconds to compile, so only marked workloads have it by
    default.
    """
    chosen, left_out = [PYCSE], {}
    for peer in PEERS[1:]:
        if not peer.covers(w) or (names and peer.name not in names and not peer.limit):
            continue
        if peer.name == "compile" and not (w.compiled or everything or names):
            continue
        if (reason := peer.missing()) or (reason := too_large(w, peer)):
            left_out[peer.name] = reason
        else:
            chosen.append(peer)
    return chosen, left_out


def too_large(w: Workload, peer: Peer = PYCSE) -> str:
    """What to say where its memory would not fit, "" where it does."""
    need, have = w.input_bytes + peer.memory(w) + OVERHEAD, available_memory()
    return f"needs about {need / 1e9:.1f} GB, {have / 1e9:.1f} GB are free" if need > have else ""


# --- parity


def parity(w: Workload, x: Inputs, peer: Peer, alternative: Alternative, expected: list[Tensor]) -> float | None:
    """The largest relative difference, of norms, of output and gradients to what ``reference`` gave; raises where it is
    more than rounding. None for a limit, which computes no loss. What draws at random is compared without its draw."""
    if peer.limit:
        return None
    if peer.name == "pycse-expected":
        expected = reference(replace(w, shuffle="expected"), x)
    elif peer.name == "pycse-one":
        expected = reference(replace(w, op="infonce"), x)
    elif w.shuffle == "sample":
        alternative = peer.build(replace(w, shuffle="none"), x)
    return compared(w, x, peer, alternative.compared(w.backward), expected)


def compared(w: Workload, x: Inputs, peer: Peer, results: list[Tensor], expected: list[Tensor]) -> float:
    worst = 0.0
    for k, (a, b) in enumerate(zip(results, expected, strict=True)):
        a, b = a.float(), b.float()
        if x.mask is not None and k == 2:  # the weight's gradient, where the weight is kept
            a, b = a * x.mask, b * x.mask
        if w.op == "distill-rows" and k == 1:
            a = a / COEFFICIENT
        worst = max(worst, ((a - b).norm() / b.norm()).item())
    allowed = 1e-2 if w.op == "sparse" and w.dtype == "bf16" else ALLOWED[w.dtype]
    if not (peer.differs and peer.requirement) and not worst <= allowed:
        raise ParityError(f"{w.name}: {peer.name} is off by {worst:.1e} from the formula in float32, not {allowed:.0e}")
    return worst
