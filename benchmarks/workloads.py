"""Every workload by name: what is computed, at which sizes, on which inputs. The one list that all benchmarks read.

A name says everything: ``focal-8192x768-fp32`` is forward and backward, ``-forward`` at its end the forward alone,
``distillcse-512x768-fp32-4-sample`` has 4 teachers, ``sparse-block32-75-2048x768x3072-fp32`` a layer 768 -> 3072 with
75% of its blocks zero, on 2048 tokens. ``…-rows-…`` is a row kernel alone, on one thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product

import torch
from torch import Tensor

from pycse.training.errors import UserError

SETS = ("short", "default", "full")  # each holds the one before
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTRASTIVE = ("infonce", "focal", "symmetric")
ROWS = ("contrastive-rows", "distill-rows")
SIDES = {"block16": 16, "block32": 32, "block64": 64, "unstructured": 1}
GUIDE = 384  # features of the guided loss' guide
LENGTHS = (12, 8, 4, 2, 1)  # of a Matryoshka loss, in twelfths of the features
LISTED = 7  # hard negatives that a row lists
CLASSES = 64  # of the supervised loss: row i is of class i modulo that
PANEL = 32  # rows of the panel that a row kernel is timed on: 1 MB at N = 8192, so caches and not memory decide
HUGE = 32768  # keys from which a call on a CPU takes so long that it is timed once, in a process of its own


@dataclass(frozen=True)
class Workload:
    op: str
    N: int  # rows: sentences, keys of a row kernel, tokens of a layer
    D: int = 768
    dtype: str = "fp32"
    backward: bool = True
    teachers: int = 0
    shuffle: str = ""
    pattern: str = ""
    zeros: int = 0  # percent
    out: int = 0
    smallest: str = "default"  # the smallest set that it belongs to
    compiled: bool = False  # beside torch.compile in every set, not in the full one only
    allocators: bool = False  # also with glibc's thresholds raised
    growth: bool = False  # a point of the curve over N
    timed: bool = True  # False: only its memory is measured

    @property
    def name(self) -> str:
        shape = f"{self.N}x{self.D}" + (f"x{self.out}" if self.out else "")
        parts = [self.op, self.pattern, f"{self.zeros}" if self.pattern else "", shape, self.dtype]
        parts += [f"{self.teachers}" if self.teachers else "", self.shuffle, "" if self.backward else "forward"]
        return "-".join(part for part in parts if part)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def huge(self) -> bool:
        return self.N >= HUGE and self.op not in ROWS and not torch.cuda.is_available()

    @property
    def by_rows(self) -> bool:
        """The loss of a row does not depend on other rows, so the formula can be computed in chunks of them."""
        return self.op in ("infonce", "focal", "sigmoid", "supcon", "guided", "directions", "lists", "matryoshka")

    @property
    def measures_memory(self) -> bool:
        """Smaller calls stay within what libraries and the allocator hold anyway."""
        return self.N >= 2048 and self.op not in ROWS and self.op != "sparse"

    @property
    def input_bytes(self) -> int:
        """Inputs and gradients."""
        if self.op == "sparse":
            return 4 * (self.N * (self.D + self.out) + self.D * self.out) * self.torch_dtype.itemsize
        return 2 * (2 + self.teachers) * self.N * self.D * self.torch_dtype.itemsize


@dataclass
class Inputs:
    leaves: list[Tensor]  # what gradients are taken of
    teachers: list[Tensor] = field(default_factory=list)  # or a guide's rows and keys
    mask: Tensor | None = None
    upstream: Tensor | None = None


def inputs(w: Workload, device: str = "cpu") -> Inputs:
    """The same numbers for every call and alternative."""
    g = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(device, w.torch_dtype).requires_grad_()

    if w.op == "sparse":
        b = SIDES.get(w.pattern, 1)
        blocks = w.out // b * (w.D // b)
        kept = torch.zeros(blocks, dtype=torch.bool)
        if w.pattern == "2:4":
            kept = (torch.arange(blocks) % 4 < 2) ^ (torch.randn(blocks // 4, generator=g) > 0).repeat_interleave(4)
        else:
            kept[torch.randperm(blocks, generator=g)[: round(blocks * (1 - w.zeros / 100))]] = True
        mask = kept.view(w.out // b, w.D // b).repeat_interleave(b, 0).repeat_interleave(b, 1)
        weight = new(w.out, w.D) * w.D**-0.5 * mask
        upstream = new(w.N, w.out).to(device, w.torch_dtype)
        return Inputs([leaf(new(w.N, w.D)), leaf(weight), leaf(new(w.out))], [], mask.to(device), upstream)
    if w.op in ROWS:
        c = PANEL
        unit = [torch.nn.functional.normalize(new(n, w.D), dim=1) for n in (c, w.N)]
        unit[1][:c] = torch.nn.functional.normalize(unit[0] + unit[1][:c], dim=1)
        S, T = unit[0] @ unit[1].t(), torch.nn.functional.normalize(unit[0] + new(c, w.D) / 28, dim=1) @ unit[1].t()
        return Inputs([leaf(S)], [T.to(device)])
    z1 = new(w.N, w.D)
    if w.op == "uniformity":
        return Inputs([leaf(z1)])
    if w.op == "supcon":  # the classes of formulas.classes, whose rows meet at a cosine of 0.5
        return Inputs([leaf(z1 + new(CLASSES, w.D)[torch.arange(w.N) % CLASSES])])
    if w.op == "distillcse":
        z2, base = z1 + 2 * new(w.N, w.D), z1 + new(w.N, w.D)
        given = w.torch_dtype if device == "cuda" else torch.float32  # as an encoder there makes them
        return Inputs([leaf(z1), leaf(z2)], [(base + new(w.N, w.D)).to(device, given) for _ in range(w.teachers)])
    if w.op == "guided":  # a guide that agrees
        base = new(w.N, GUIDE)
        guide = [(base + new(w.N, GUIDE)).to(device) for _ in range(2)]
        return Inputs([leaf(z1), leaf(z1 + 2 * new(w.N, w.D))], guide)
    if w.op == "lists":
        return Inputs(
            [leaf(z1), leaf(torch.cat([z1 + 2 * new(w.N, w.D), z1.repeat(LISTED, 1) + 3 * new(LISTED * w.N, w.D)]))]
        )
    # Positives at a cosine of 0.45: a loss that is neither solved nor noise.
    return Inputs([leaf(z1), leaf(z1 + 2 * new(w.N, w.D))])


def lengths(D: int) -> list[int]:
    """Those of a Matryoshka loss: 768, 512, 256, 128 and 64 of 768 features."""
    return [D * share // 12 for share in LENGTHS]


def small(w: Workload) -> Workload:
    """The same with fewer rows: loads the libraries and MKL's packing buffers before memory is measured."""
    return replace(w, N=min(2048, w.N // 4))


def _workloads() -> list[Workload]:
    focal = [
        Workload("focal", 64, smallest="short"),
        Workload("focal", 64, dtype="bf16", smallest="short"),
        Workload("focal", 128),
        Workload("focal", 512, smallest="short", compiled=True, growth=True),
        Workload("focal", 512, dtype="bf16"),
        Workload("focal", 512, backward=False),
        *(Workload("focal", N, growth=True) for N in (256, 1024, 2048, 4096)),
        Workload("focal", 8192, compiled=True, allocators=True, growth=True),
        Workload("focal", 8192, backward=False),
        Workload("focal", 8192, 384, compiled=True, allocators=True),
        Workload("focal", 8192, dtype="bf16", compiled=True, allocators=True),
        *(Workload("focal", N, growth=True) for N in (16384, 32768, 65536)),
    ]
    others = [
        Workload(op, N, smallest="short" if N == 512 else "default", compiled=N == 512)
        for op, N in product(("infonce", "symmetric"), (64, 512, 4096))
    ]
    others.append(Workload("infonce", 4096, dtype="bf16"))
    distill = [
        Workload("distillcse", 64, teachers=1, shuffle="sample", smallest="short"),
        Workload("distillcse", 64, teachers=16, shuffle="sample"),
        Workload("distillcse", 512, teachers=4, shuffle="sample", smallest="short"),
        Workload("distillcse", 4096, teachers=4, shuffle="sample"),
        Workload("distillcse", 16384, teachers=4, shuffle="sample", timed=False),
    ]
    sigmoid = [
        Workload("sigmoid", 512, compiled=True),
        Workload("sigmoid", 4096, allocators=True),
        Workload("sigmoid", 16384, allocators=True),
    ]
    supcon = [
        Workload("supcon", 512, compiled=True),
        Workload("supcon", 4096, allocators=True),
        Workload("supcon", 16384, allocators=True),
    ]
    parts = [
        Workload("guided", 4096, allocators=True),
        Workload("guided", 16384, allocators=True),
        Workload("directions", 4096, allocators=True),
        Workload("lists", 2048, allocators=True),
    ]
    matryoshka = [
        Workload("matryoshka", 64),
        Workload("matryoshka", 512),
        Workload("matryoshka", 8192, allocators=True),
        Workload("matryoshka", 8192, dtype="bf16"),
        Workload("matryoshka", 32768, timed=False),
    ]
    uniformity = [
        Workload("uniformity", 512, smallest="short"),
        Workload("uniformity", 2048),
        Workload("uniformity", 8192, allocators=True),
        Workload("uniformity", 32768, timed=False),
    ]
    rows = [
        *(Workload("contrastive-rows", 8192, dtype=dtype, smallest="short") for dtype in DTYPES),
        *(Workload("distill-rows", 4096, shuffle=s, smallest="short") for s in ("none", "expected", "sample")),
    ]
    layers = []
    shapes = [(768, 3072), (3072, 768)]  # in, out: the two halves of BERT's feed-forward layer
    patterns = [("block32", 75), ("block32", 90), ("block64", 75), ("block16", 75), ("unstructured", 90)]
    patterns.append(("unstructured", 95))
    cases = [(2048, "fp32", *shape, *pattern) for shape, pattern in product(shapes, patterns)]
    cases += [(2048, "bf16", *shapes[0], "block32", 90), (2048, "bf16", *shapes[0], "unstructured", 90)]
    cases += [(32, "fp32", *shapes[0], "block32", 90), (32, "fp32", *shapes[0], "unstructured", 90)]
    for (N, dtype, D, out, pattern, zeros), backward in product(cases, (False, True)):
        checked = (N, D, backward) == (2048, 768, False) and (pattern, zeros) in (patterns[0], patterns[4])
        smallest = "short" if checked and dtype == "fp32" else "default"
        layers.append(
            Workload(
                "sparse", N, D, dtype, backward, pattern=pattern, zeros=zeros, out=out, smallest=smallest
            )  # fmt: skip
        )
    full = [
        Workload(op, N, D, dtype, backward, smallest="full")
        for op, N, D, dtype, backward in product(
            CONTRASTIVE, (64, 512, 4096, 16384, 65536), (384, 768, 1024), DTYPES, (True, False)
        )
    ]
    full += [
        Workload("distillcse", N, dtype=dtype, teachers=K, shuffle=shuffle, smallest="full")
        for N, dtype, K, shuffle in product((64, 512, 4096), DTYPES, (1, 4, 16), ("none", "expected", "sample"))
    ]
    full += [
        Workload("uniformity", N, D, dtype, smallest="full")
        for N, D, dtype in product((512, 4096, 16384), (384, 768, 1024), DTYPES)
    ]
    full.append(Workload("sparse", 2048, 768, "bf16", False, pattern="2:4", zeros=50, out=3072, smallest="full"))
    by_name: dict[str, Workload] = {}
    for w in (*focal, *others, *distill, *sigmoid, *supcon, *parts, *matryoshka, *uniformity, *rows, *layers, *full):
        by_name.setdefault(w.name, w)
    return list(by_name.values())


def _on_a_gpu() -> list[tuple[str, Workload]]:
    largest = [Workload(op, 65536, dtype="bf16", compiled=op == "focal") for op in ("focal", "symmetric", "infonce")]
    batches = [Workload("focal", N, dtype="bf16") for N in (64, 128, 256, 512)]
    distill = [Workload("distillcse", N, dtype="bf16", teachers=K, shuffle="sample") for N, K in ((64, 16), (16384, 4))]
    layers = [
        Workload("sparse", 8192, 768, "bf16", backward, pattern="block64", zeros=75, out=3072)
        for backward in (False, True)
    ]
    others = [
        Workload(op, N, dtype="bf16", compiled=(op, N) == ("focal", 8192))
        for N, op in product((8192, 16384, 32768), ("focal", "symmetric", "infonce"))
    ]
    return [
        *(("rows", w) for w in largest),
        *(("graph", w) for w in (*batches, distill[0])),
        *(("rows", w) for w in (distill[1], *batches)),
        *(("rows", Workload("matryoshka", N, dtype="bf16")) for N in (512, 8192)),
        *(("cold", w) for w in layers),
        *(("rows", w) for w in others),
    ]


WORKLOADS = _workloads()
# What benchmarks/gpu.py measures, the targets first: as a call comes, as a CUDA graph, or with a cold L2 cache.
ON_A_GPU = _on_a_gpu()


def select(chosen: str, pattern: str = "*") -> list[Workload]:
    """Workloads of a set by their names' pattern; a pattern that only a larger set knows finds it there."""
    found = [w for w in WORKLOADS if fnmatchcase(w.name, pattern)]
    if not found:
        raise UserError(f"no workload is called {pattern!r}; for example {WORKLOADS[0].name}, or focal-*")
    return [w for w in found if SETS.index(w.smallest) <= SETS.index(chosen)] or found
