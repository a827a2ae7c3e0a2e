"""Garbage for the compiled module: arguments that no caller should pass, each of which must be refused before any work.

A call is a function and its arguments on real buffers. Hypothesis replaces some of the arguments by what must be
refused; the call has to raise ValueError or TypeError, and leave every buffer as it was. Sizes that are merely too
large for a buffer cannot be seen from addresses and are not tried. Runs in a process of its own, ``garbage.py log
examples native|emulated``: the last call stands in the log.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import emulation
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycse.kernels import native
from torch import Tensor

from pycse.ops.sparse import pattern_of
from pycse.pattern import Pattern, pack_mask

B, N, D = 4, 6, 5
WORDS = st.sampled_from(["3", None, 1.5, [], object])


def outside(low: int, high: int, type_bits: int = 64) -> st.SearchStrategy[int]:
    """Integers of the type, and some beyond it, that are not between the two."""
    most = 2 ** (type_bits - 1) - 1
    edges = [low - 1, high + 1, -1, most, -most - 1, most + 1, 2**200, -(2**200)]
    ranges = [st.integers(max_value=low - 1), st.integers(min_value=high + 1)]
    return st.one_of(st.sampled_from([x for x in edges if not low <= x <= high]), *ranges)


HUGE = 2**57
LOGIT = [20.0, 0.0, 0.0, 20.0, 6.0, 6.0, 0.0, 0.0]  # coefficients of Focal-InfoNCE
SIZE, SIZE32 = outside(0, HUGE), outside(0, 2**31 - 1, 32)
DTYPE, THREADS = outside(0, 2), outside(1, 4096, 32)
ADDRESS = st.one_of(st.integers(max_value=-1), st.integers(min_value=2**64))  # not addresses at all
NEEDED = st.one_of(ADDRESS, st.just(0))
NUMBER = WORDS.filter(lambda x: x != 1.5)
NOTHING = WORDS.filter(lambda x: x is not None)
MAYBE = NOTHING.filter(lambda x: x != 1.5)  # where None, or any number, says something


@dataclass
class Argument:
    value: Any
    refused: st.SearchStrategy[Any] | None = None  # None: only what is no number
    says: str | None = None  # a name in the error, where it is not the argument's own


@dataclass
class Call:
    name: str
    function: Any
    arguments: dict[str, Argument]
    buffers: list[Tensor]
    by_name: bool = False
    kept: Any = field(default=None)  # what addresses belong to

    def run(self, replaced: dict[str, Any]) -> Any:
        values = {name: replaced.get(name, a.value) for name, a in self.arguments.items()}
        return self.function(**values) if self.by_name else self.function(*values.values())


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, dtype=torch.float32, device="cpu").to(dtype)


def at(t: Tensor) -> Argument:
    return Argument(t.data_ptr(), NEEDED)


def optional(t: Tensor) -> Argument:
    return Argument(t.data_ptr(), ADDRESS)


def read(stride: int, says: str) -> Argument:
    return Argument(stride, outside(0, HUGE), says)


def written(stride: int, says: str) -> Argument:
    return Argument(stride, outside(stride, HUGE), says)


def flag(value: bool) -> Argument:
    return Argument(value, MAYBE)


class Table:
    """The calls of the processor's kernels or, ``emulated``, of the GPU's on the host."""

    def __init__(self, emulated: bool) -> None:
        self.native, self.emulated = native(), emulated
        self.module = emulation.kernels() if emulated else native()
        self.size = SIZE32 if emulated else SIZE
        self.bits = 32 if emulated else 64
        self.calls: list[Call] = []
        self.problems()
        self.norms()
        self.sparse()

    def add(
        self, name: str, arguments: dict[str, Argument], *buffers: Tensor, by_name: bool = False, kept: Any = None
    ) -> None:
        tail = {"where": Argument((0, 0), WORDS)} if self.emulated else {"threads": Argument(2, THREADS)}
        alone = (
            "small_work_size",
            "small_distill_work_size",
            "small_prefixes_work_size",
            "SparsePattern",
            "fingerprint",
        )
        if not by_name and name not in alone:
            if "threads" not in arguments:
                arguments = arguments | tail
            elif self.emulated:
                arguments = {k: a for k, a in arguments.items() if k != "threads"} | tail
        self.calls.append(Call(name, getattr(self.module, name), arguments, list(buffers), by_name, kept))

    def among(self, value: int, most: int) -> Argument:
        return Argument(value, outside(0, most, self.bits), "i0" if value == 0 else None)

    def struct(self, value: Any) -> Argument:
        return Argument(value, WORDS)

    def contrastive(self, n: int, symmetric: bool = False) -> tuple[Any, list[Tensor]]:
        r2, s_pos, coef, loss = new(n), new(B), new(B), new(B)
        tensors = dict(r2=r2, s_pos=s_pos, coef=coef, loss=loss)
        if symmetric:
            wide = torch.float32 if self.emulated else torch.float64
            tensors |= {k: new(B, dtype=wide) for k in ("lpos", "lneg", "column_max", "column_sum", "lneg_column")}
            tensors["lse_column"] = new(B)
        kept = list(tensors.values())
        p = self.module.Contrastive(B=B, N=n, logit=LOGIT, shift=26.0, **{k: t.data_ptr() for k, t in tensors.items()})
        return p, kept

    def panel(self, S: Tensor, writes: bool) -> dict[str, Argument]:
        ld = written(S.stride(0), "S") if writes else read(S.stride(0), "S")
        return {
            "dtype": Argument(0, DTYPE),
            "S": at(S),
            "ld": ld,
            "i0": self.among(0, 0),
            "c": self.among(B, B) if writes else self.among(B, B),
        }

    def problems(self) -> None:
        f, S = new(B), new(B, N)
        p, kept = self.contrastive(N)
        last = {"threads": Argument(2, THREADS), "grad": flag(True)}
        if self.emulated:
            last = {"grad": flag(True)}
        self.add("rows", {"p": self.struct(p), **self.panel(S, True), "f": at(f), **last}, S, f, *kept, kept=kept)
        S = new(B, B)
        p, kept = self.contrastive(B, symmetric=True)
        for name, writes in (("columns", False), ("symmetric", True)):
            self.add(name, {"p": self.struct(p), **self.panel(S, writes)}, S, *kept, kept=kept)
        z1, z2 = new(B, D), new(N, D)
        p, kept = self.contrastive(N)
        vectors = {
            "z1hat": at(z1),
            "ld1": read(D, "z1hat"),
            "z2": at(z2),
            "ld2": read(D, "z2"),
            "D": Argument(D, self.size, "z"),
        }
        self.add(
            "positives",
            {
                "p": self.struct(p),
                "dtype": Argument(0, DTYPE),
                **vectors,
                "i0": self.among(0, 0),
                "n": Argument(B, outside(0, B, self.bits), ""),
            },
            z1,
            z2,
            *kept,
            kept=kept,
        )
        work, dz1, dz2, total = new(4096), new(B, D), new(N, D), new(1)
        inputs = {"z1": at(z1), "ld1": read(D, "z1"), "z2": at(z2), "ld2": read(D, "z2")}
        features = {"D": Argument(D, self.size, "z")}
        middle = {**inputs, **features} if self.emulated else {**features, **inputs}
        flags = {"normalize": flag(True), "symmetric": flag(False)} | ({"grad": flag(True)} if self.emulated else {})
        self.add(
            "small",
            {
                "p": self.struct(p),
                "dtype": Argument(0, outside(0, 1)),
                **middle,
                **flags,
                "work": at(work),
                "dz1": optional(dz1),
                "dz2": optional(dz2),
                "total": optional(total),
            },
            z1,
            z2,
            dz1,
            dz2,
            total,
            *kept,
            kept=(kept, work),
        )
        coef, loss, T, scratch = new(B), new(B), new(B, B), new(4096)
        numbers: dict[str, Argument] = dict(
            B=Argument(B, outside(0, 2**31 - 1, self.bits)),
            student_temperature=Argument(0.1, NUMBER),
            teacher_temperature=Argument(0.1, NUMBER),
            group_temperature=Argument(1.0, NUMBER),
            divergence=Argument(0, outside(0, 2, 32)),
            grouping=Argument(1, outside(0, 3, 32)),
            group_value=Argument(0.3, st.sampled_from([0.0, -1.0, 1.5, 1e-300, float("nan"), float("inf")])),
            group_end=Argument(0, outside(0, 2**31 - 1)),
            sample=flag(True),
            seed=Argument(1, ADDRESS),
        )
        if self.emulated:
            numbers["seed_at"] = Argument(0, ADDRESS)
        numbers |= dict(coef=optional(coef), coef_all=Argument(1.0, NUMBER), loss=at(loss))
        self.add("Distill", numbers, coef, loss, by_name=True)
        d = self.module.Distill(**{k: a.value for k, a in numbers.items()})
        teachers = {
            "teacher_dtype": Argument(0, DTYPE),
            "teachers": Argument(T.data_ptr(), NEEDED, "T" if self.emulated else None),
            "teachers_ld": read(B, ""),
        }
        if self.emulated:
            teachers = teachers | {"scratch": at(scratch), "rows": Argument(1, outside(0, 2**31 - 1, 32))}
        self.add(
            "distill",
            {"p": self.struct(d), **self.panel(S, True), **teachers, "grad": flag(True)},
            S,
            T,
            coef,
            loss,
            kept=scratch,
        )
        bias, sums = new(N), new(N)
        values = dict(u=3.0, bias=bias.data_ptr(), sums=sums.data_ptr())
        u = self.module.Uniformity(**values)
        panel = self.panel(S, True) | {
            "i0": Argument(0, outside(0, 2**31 - 1 - B if self.emulated else HUGE, self.bits))
        }
        panel |= {
            "c": Argument(B, outside(0, B, self.bits), ""),
            "n": Argument(B, outside(B, 2**31 - 1 if self.emulated else HUGE, self.bits)),
        }
        self.add("uniformity", {"p": self.struct(u), **panel, "grad": flag(True)}, S, bias, sums, kept=(bias, sums))
        self.constructor(kept)
        if not self.emulated:
            self.alone(d, S, coef, loss, z1)
            self.prefixes()
            self.adapacse()
            self.sigmoid()
            self.supervised()

    def constructor(self, kept: list[Tensor]) -> None:
        r2, s_pos, coef, loss = kept
        arguments: dict[str, Argument] = dict(
            B=Argument(B, outside(0, N, self.bits), ""),
            N=Argument(N, outside(B, 2**31 - 1 if self.emulated else HUGE, self.bits), ""),
            logit=Argument(LOGIT, MAYBE),
            logit_at=Argument(0, ADDRESS),
            shift=Argument(None, MAYBE),
            exclude_by=Argument(1, outside(0, 2, 32)),
            exclude_above=Argument(0.1, NUMBER),
            exclude_each=Argument(0, ADDRESS),
            r2=optional(r2),
            s_pos=optional(s_pos),
            positives=Argument(0, ADDRESS),
            query_ids=Argument(0, st.one_of(ADDRESS, st.just(r2.data_ptr()))),
            key_ids=Argument(0, ADDRESS),
            coef=optional(coef),
            coef_all=Argument(1.0, NUMBER),
            loss=optional(loss),
            dlogit=Argument(0, ADDRESS),
        )
        self.add("Contrastive", arguments, by_name=True)

    def prefixes(self) -> None:
        """Two lengths."""
        (p, kept), (q, others) = self.contrastive(N), self.contrastive(N)
        other = self.module.Contrastive(B=B, N=N + 1, logit=LOGIT, shift=26.0, loss=kept[-1].data_ptr())
        lengths = Argument([p, q], st.sampled_from([[], [p] * 17, [p, other], [p, None], None, 3]))
        S, rho, t, columns = new(2 * B, N), new(2, B), new(2, B), new(2, N)
        panel = self.panel(S, True)
        first = {name: panel.pop(name) for name in ("dtype", "S", "ld")}
        step = Argument(B * N, st.sampled_from([-1, 0, B * N - 1, HUGE * 16]))
        self.add(
            "prefixes",
            {
                "lengths": lengths,
                **first,
                "step": step,
                **panel,
                "rho": at(rho),
                "t": at(t),
                "columns": at(columns),
                "threads": Argument(2, THREADS),
                "grad": flag(True),
            },
            S,
            rho,
            t,
            columns,
            *kept,
            *others,
        )
        z1, z2, work, dz1, dz2 = new(B, D), new(N, D), new(4096), new(B, D), new(N, D)
        self.add(
            "small_prefixes",
            {
                "lengths": lengths,
                "dims": Argument([2, 5], st.sampled_from([[], [2], [5, 2], [2, 2], [0, 5], [2, 6], [-1, 5], None])),
                "dtype": Argument(0, outside(0, 1)),
                "D": Argument(D, st.sampled_from([0, 4, -1]), "dims"),
                "z1": at(z1),
                "ld1": read(D, "z1"),
                "z2": at(z2),
                "ld2": read(D, "z2"),
                "normalize": flag(True),
                "work": at(work),
                "dz1": optional(dz1),
                "dz2": optional(dz2),
            },
            z1,
            z2,
            dz1,
            dz2,
            *kept,
            *others,
            kept=work,
        )
        sizes = {"lengths": Argument(2, outside(1, 16)), "B": Argument(B, SIZE, ""), "N": Argument(N, SIZE, "")}
        self.add("small_prefixes_work_size", sizes | {"longest": Argument(D, outside(1, HUGE), "")})

    def alone(self, d: Any, S: Tensor, coef: Tensor, loss: Tensor, z: Tensor) -> None:
        """What only the processor's kernels have."""
        e, work, dz = new(B, 7), new(1024), new(B, D)
        teachers = Argument(
            [(0, e.data_ptr(), 7, 7)],
            st.sampled_from(
                [
                    [(2, e.data_ptr(), 7, 7)],
                    [(-1, e.data_ptr(), 7, 7)],
                    [(0, 0, 7, 7)],
                    [(0, e.data_ptr(), -7, 7)],
                    [(0, e.data_ptr(), 7, -7)],
                    [(0, e.data_ptr(), HUGE, 7)],
                    [(0, e.data_ptr(), 7, HUGE)],
                    [(0, e.data_ptr(), 7)],
                    [None],
                    3,
                    [],
                ]
            ),
        )
        self.add(
            "small_distill",
            {
                "d": self.struct(d),
                "dtype": Argument(0, outside(0, 1)),
                "z": at(z),
                "ld": read(D, "z"),
                "D": Argument(D, SIZE, "z"),
                "normalize": flag(True),
                "teachers": teachers,
                "weights": Argument([1.0], st.sampled_from([[], [1.0, 2.0], None, "x"])),
                "logits_dtype": Argument(0, DTYPE),
                "logits": Argument(0, ADDRESS),
                "logits_ld": Argument(0),
                "work": at(work),
                "dz": optional(dz),
            },
            z,
            e,
            dz,
            coef,
            loss,
            kept=work,
        )
        sizes = {"B": Argument(B, SIZE, ""), "N": Argument(N, SIZE, ""), "D": Argument(D, SIZE, "")}
        self.add("small_work_size", sizes | {"dtype": Argument(0, outside(0, 1)), "symmetric": flag(True)})
        sizes = {"B": Argument(B, SIZE), "D": Argument(D, SIZE, ""), "teachers": Argument(1, SIZE, "")}
        self.add("small_distill_work_size", sizes | {"dtype": Argument(0, outside(0, 1))})
        self.add(
            "fingerprint",
            {"begin": at(S), "bytes": Argument(S.nbytes, st.one_of(ADDRESS, st.integers(2**57, 2**64 - 1)))},
            S,
        )

    def supervised(self) -> None:
        S, r2, coef, loss, dlogit, f = new(B, N), new(N), new(B), new(B), new(B), new(B)
        ptr, keys = torch.tensor([0, 2, 6, 6]), torch.arange(N)
        classes = torch.tensor([0, 1, 2, 1])
        arguments: dict[str, Argument] = dict(
            B=Argument(B, outside(0, HUGE), ""),
            N=Argument(N, outside(N, HUGE), ""),
            b=Argument(20.0, NUMBER),
            shift=Argument(None, MAYBE),
            same=flag(False),
            inside=flag(True),
            ptr=at(ptr),
            keys=at(keys),
            classes=at(classes),
            class_count=Argument(3, outside(1, N + 1)),
            r2=at(r2),
            coef=optional(coef),
            coef_all=Argument(1.0, NUMBER),
            loss=at(loss),
            dlogit=optional(dlogit),
        )
        lists = (ptr, keys, classes)
        self.add("Supervised", arguments, r2, coef, loss, dlogit, *lists, by_name=True)
        p = self.module.Supervised(**{name: a.value for name, a in arguments.items()})
        last = {"threads": Argument(2, THREADS), "grad": flag(True)}
        buffers = (S, f, coef, loss, dlogit, *lists)
        self.add("supervised", {"p": self.struct(p), **self.panel(S, True), "f": at(f), **last}, *buffers, kept=r2)

    def adapacse(self) -> None:
        S, T, f, dlogit = new(B, N), new(B, N), new(B), new(B)
        r2, coef, loss = new(N), new(B), new(B)
        pointers = {k: t.data_ptr() for k, t in dict(r2=r2, coef=coef, loss=loss, dlogit=dlogit).items()}
        p = self.module.Contrastive(
            B=B, N=N, logit=[0.0, 20.0, 0.0, 0.0, 20.0, 20.0, 0.0, 0.0], shift=-20.0, **pointers
        )
        angle = Argument(0.3, st.sampled_from([-1e-9, 1.6, -1.0, 1e300, float("nan"), float("inf")]))
        teacher = {"T": at(T), "ld_T": read(N, "T"), "dtype_T": Argument(0, DTYPE)}
        last = {"threads": Argument(2, THREADS), "grad": flag(True)}
        arguments = {"p": self.struct(p), "m": angle, **self.panel(S, True), "f": at(f), **teacher, **last}
        self.add("adapacse", arguments, S, T, f, coef, loss, dlogit, kept=r2)

    def sigmoid(self) -> None:
        S, r2, coef, loss, dlogit = new(B, N), new(N), new(B), new(B), new(2, B)
        arguments: dict[str, Argument] = dict(
            B=Argument(B, outside(0, N), ""),
            N=Argument(N, outside(B, HUGE), ""),
            scale=Argument(10.0, NUMBER),
            bias=Argument(-10.0, NUMBER),
            r2=at(r2),
            s_pos=Argument(0, ADDRESS),
            positives=Argument(0, ADDRESS),
            query_ids=Argument(0, st.one_of(ADDRESS, st.just(r2.data_ptr()))),
            key_ids=Argument(0, ADDRESS),
            coef=optional(coef),
            coef_all=Argument(1.0, NUMBER),
            loss=at(loss),
            dlogit=optional(dlogit),
        )
        self.add("Sigmoid", arguments, r2, coef, loss, dlogit, by_name=True)
        p = self.module.Sigmoid(**{name: a.value for name, a in arguments.items()})
        last = {"threads": Argument(2, THREADS), "grad": flag(True)}
        self.add("sigmoid", {"p": self.struct(p), **self.panel(S, True), **last}, S, coef, loss, dlogit, kept=r2)

    def norms(self) -> None:
        z, r, out, g, f = new(N, D), new(N), new(N, D), new(N, D), new(N)
        rows = {"z": at(z), "ld": read(D, "z"), "n": Argument(N, self.size, ""), "D": Argument(D, self.size, "")}
        arguments = {
            "dtype": Argument(0, DTYPE),
            **rows,
            "r": optional(r),
            "out": optional(out),
            "ld_out": written(D, "out"),
            "factor": Argument(1.0, NUMBER),
        }
        self.add("normalize", arguments, z, r, out)
        types = {"dtype": Argument(0, DTYPE), "g_dtype": Argument(0, outside(0, 0))}
        end = {"r": at(r), "f": optional(f), "scaled": flag(False), "out": at(out)}
        if self.emulated:
            self.add("project", {**types, **rows, "g": at(g), **end}, z, g, r, f, out)
            return
        first = {k: rows[k] for k in ("z", "ld")}
        sizes = {k: rows[k] for k in ("n", "D")}
        self.add(
            "project",
            {**types, **first, "g": at(g), "g_ld": Argument(0, outside(0, HUGE), "g"), **sizes, **end},
            z,
            g,
            r,
            f,
            out,
        )
        turned = {"g": at(g), "g_ld": Argument(N, st.one_of(st.integers(1, N - 1), outside(0, HUGE)), "g")}
        self.add("project", {**types, **first, **turned, **sizes, **end}, z, g, r, f, out)

    def sparse(self) -> None:
        T, out, in_ = 3, 32, 64
        mask = torch.ones(out, in_, dtype=torch.bool, device="cpu")
        x, w, dy, y, dw, bias = new(T, in_), new(out, in_), new(T, out), new(T, out), new(out, in_), new(out)
        bits = pack_mask(mask)
        if self.emulated:
            pattern = Pattern.from_mask(mask, 16)
            for block in (0, 16):
                kept = {
                    "ptr": at(pattern.ptr) if block else Argument(0, ADDRESS),
                    "index": at(pattern.cols) if block else Argument(0, ADDRESS),
                    "bits": Argument(0, ADDRESS) if block else at(bits),
                    "words": Argument(0, WORDS) if block else Argument(2, outside(2, 2**31 - 1, 32)),
                }
                arguments = {
                    "which": Argument(0, outside(0, 2, 32)),
                    "storage": Argument(0, outside(0, 3, 32)),
                    "T": Argument(T, SIZE32),
                    "out": Argument(out, SIZE32, ""),
                    "in": Argument(in_, SIZE32, ""),
                    "block": Argument(block, st.sampled_from([-1, 1, 8, 17, 48, 128, 2**31])),
                    **kept,
                    "a": at(x),
                    "lda": read(in_, "a"),
                    "b": at(w),
                    "ldb": read(in_, "b"),
                    "bias": optional(bias),
                    "c": at(y),
                    "splits": Argument(1, outside(1, 2**31 - 1, 32)),
                    "partial": Argument(0, ADDRESS),
                    "pieces": Argument(pattern.nnz if block else out, SIZE32),
                }
                self.add("sparse", arguments, x, w, bias, y, kept=(pattern, bits))
            pattern = Pattern.from_mask(mask, 1)
            marked = bits.clone()
            arguments = {
                "ptr": at(pattern.ptr),
                "index": optional(pattern.cols),
                "bits": at(marked),
                "rows": Argument(out, SIZE32),
                "words": Argument(2, SIZE32),
            }
            self.add("mark", arguments, marked, kept=pattern)
            return
        for block in (1, 16):
            pattern = pattern_of(mask, block)
            tensors = dict(zip(("ptr", "cols", "t_ptr", "t_rows", "plan", "t_plan"), pattern.tensors))
            shape = {
                "out": Argument(out, st.one_of(st.integers(max_value=-1), st.just(2**62)), ""),
                "in": Argument(in_, st.one_of(st.integers(max_value=-1), st.just(2**62)), ""),
            }
            lists = {k: at(t) if t.numel() else optional(t) for k, t in tensors.items()}
            arguments = {
                **shape,
                "block": Argument(block, st.sampled_from([0, -1, 2, 8, 17, 48, 128, 2**31])),
                **lists,
                "packed": Argument(0, ADDRESS),
            }
            self.add("SparsePattern", arguments, kept=pattern)
            p = self.module.SparsePattern(*(a.value for a in arguments.values()))
            kept = (pattern, p)
            weight = {"w": at(w), "ldw": read(in_, "w")}
            self.add(
                "sparse_product",
                {
                    "p": self.struct(p),
                    "dtype": Argument(0, DTYPE),
                    "x": at(x),
                    "ldx": read(in_, "x"),
                    **weight,
                    "bias": optional(bias),
                    "y": at(y),
                    "n": Argument(T, SIZE, ""),
                    "transposed": flag(False),
                },
                x,
                w,
                bias,
                y,
                kept=kept,
            )
            self.add(
                "sparse_outer",
                {
                    "p": self.struct(p),
                    "dtype": Argument(0, DTYPE),
                    "dy": at(dy),
                    "ldy": read(out, "dy"),
                    "x": at(x),
                    "ldx": read(in_, "x"),
                    "dw": at(dw),
                    "n": Argument(T, SIZE, ""),
                },
                dy,
                x,
                dw,
                kept=kept,
            )
            if block == 1:
                packed = new(out * in_)
                self.add(
                    "sparse_pack",
                    {"p": self.struct(p), "dtype": Argument(0, DTYPE), **weight, "packed": at(packed)},
                    w,
                    packed,
                    kept=kept,
                )
        self.add(
            "mask_weight",
            {
                "dtype": Argument(0, DTYPE),
                "w": at(w),
                "ldw": read(in_, "w"),
                "bits": at(bits),
                "out": Argument(out, SIZE, ""),
                "in": Argument(in_, SIZE, ""),
                "result": at(dw),
            },
            w,
            dw,
            bits,
        )
        if not self.native.has_dense_products():
            return
        sides = {
            "out": Argument(out, st.sampled_from([-32, 31, 33, 2**60, 2**63])),
            "in": Argument(in_, st.sampled_from([-32, 31, 33, 2**60, 2**63])),
        }
        self.add(
            "dense_product",
            {
                "x": at(x),
                "ldx": read(in_, "x"),
                "w": at(w),
                "ldw": read(in_, "w"),
                **sides,
                "y": at(y),
                "ldy": written(out, "y"),
                "n": Argument(T, SIZE, ""),
                "transposed": flag(False),
                "add": flag(False),
            },
            x,
            w,
            y,
        )
        self.add(
            "dense_outer",
            {
                "dy": at(dy),
                "ldy": read(out, "dy"),
                "x": at(x),
                "ldx": read(in_, "x"),
                **sides,
                "dw": at(dw),
                "n": Argument(T, SIZE, ""),
                "add": flag(False),
            },
            dy,
            x,
            dw,
        )


def held(t: Tensor) -> bytes:
    return t.view(torch.uint8).numpy().tobytes()


def refuse(call: Call, log: Any, examples: int) -> int:
    """How many calls were refused."""
    names = list(call.arguments)
    first = call.run({})
    if isinstance(first, bool) and call.name.startswith("small"):
        assert first, call.name
    before = [held(t) for t in call.buffers]
    count = 0

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        nonlocal count
        chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        replaced = {}
        for name in chosen:
            strategy = call.arguments[name].refused
            replaced[name] = data.draw(MAYBE if strategy is None else st.one_of(strategy, strategy, MAYBE))
        log.seek(0)
        log.write(f"{call.name}({replaced})\n".ljust(400))
        log.flush()
        try:
            call.run(replaced)
        except (ValueError, TypeError) as error:
            name = chosen[0]
            if len(chosen) == 1 and isinstance(error, ValueError):
                says = call.arguments[name].says
                assert (name if says is None else says) in str(error), (
                    f"{call.name}({replaced}) does not name it: {error}"
                )
        else:
            raise AssertionError(f"{call.name}({replaced}) was not refused")
        assert [held(t) for t in call.buffers] == before, f"{call.name}({replaced}) wrote before it was refused"
        count += 1

    tried()
    return count


def main() -> None:
    torch.manual_seed(0)
    examples = int(sys.argv[2])
    with open(sys.argv[1], "w") as log:
        calls = Table(sys.argv[3] == "emulated").calls
        count = sum(refuse(call, log, examples) for call in calls)
    print(f"{count} refused, {len(calls)} functions")


if __name__ == "__main__":
    main()
