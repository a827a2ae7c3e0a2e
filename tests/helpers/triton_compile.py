"""Compiles every Triton kernel as its launcher launches it, for sm_80 and sm_90, on a machine that needs no GPU.

The panel driver runs on small CPU tensors with launches recorded instead of made, so that signatures and options are
the launchers' own. Prints registers, spills (stack) and shared memory; exits with an error where a kernel does not
compile, spills, leaves its tensor cores idle, or a block asks for more shared memory than its architecture has.

    python tests/helpers/triton_compile.py [80 90]
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pycse.backends.triton import adapacse as angles
from pycse.backends.triton import contrastive as backend
from pycse.backends.triton import distill as distillation
from pycse.backends.triton import prefixes, sparse
from pycse.backends.triton import sigmoid as pairs
from pycse.backends.triton import supervised as classes
from pycse.backends.triton import uniformity as hypersphere
from pycse.panels import prefixes as lengths_driver
from pycse.pattern import Pattern, pack_mask
from pycse.problem import (
    Alignment,
    Angular,
    AngularNeeds,
    Contrastive,
    Distillation,
    Grouping,
    Lengths,
    Needs,
    Sigmoid,
    SigmoidNeeds,
    Supervised,
    SupervisedNeeds,
    Uniformity,
)

PLAIN_TILE = backend.tile
FUSED = ("fused_rows", "fused_sums", "fused_gradients")
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227}
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
}
CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

LENGTHS = ("plain", "forward", "options", "exclude each", "maximum", "tensors")  # problems, of several lengths as well
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
launches: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = []
label = ""


def record(fn: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In place of JITFunction.run."""
    given = dict(zip(fn.arg_names, args))
    options = {k: v for k, v in kwargs.items() if k not in fn.arg_names}
    given.update((k, v) for k, v in kwargs.items() if k in fn.arg_names)
    launches.append((label, fn, {name: given[name] for name in fn.arg_names}, options))


def source(fn: Any, given: dict[str, Any]) -> ASTSource:
    """Specialised as Triton does at a launch: None, 1 and constexprs are constants, multiples of 16 are known as
    such."""
    constants = {fn.arg_names[i] for i in fn.constexprs}
    signature, constexprs, attrs = {}, {}, {}
    for i, (name, value) in enumerate(given.items()):
        aligned = isinstance(value, (torch.Tensor, int)) and name not in constants
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constexprs[i,] = "constexpr", value
            continue
        if hasattr(value, "block_shape"):  # a tensor descriptor
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[name] = "fp32"
        if aligned:
            attrs[i,] = [["tt.divisibility", 16]]
    return ASTSource(fn, signature, constexprs, attrs)


def problems(dtype: torch.dtype) -> dict[str, Contrastive]:
    def problem(B: int, N: int, D: int, **options: Any) -> Contrastive:
        z1, z2 = torch.randn(B, D).to(dtype), torch.randn(N, D).to(dtype)
        base: dict[str, Any] = {"temperature": 0.05, "m": 0.3, "form": "focal", "needs": Needs(True, True)}
        return Contrastive(z1, z2, **{**base, **options})

    ids = {"query_ids": torch.arange(32), "key_ids": torch.arange(512)}
    tensors = {"temperature": torch.tensor(0.05), "m": torch.tensor(0.3), "needs": Needs(True, True, True, True, True)}
    hardness: dict[str, Any] = {"hardness": 1.0, "hardness_mode": "in_batch_negatives", "positive_margin": 0.1}
    each = {"exclude_each": torch.zeros(32), "exclude_by": "relative"}
    square = {"query_ids": torch.arange(32), "key_ids": torch.arange(32), "symmetric": True, "exclude_above": 0.1}
    return {
        "plain": problem(32, 512, 64),
        "ragged": problem(33, 515, 35, form="infonce"),
        "odd N": problem(32, 515, 64),
        "forward": problem(32, 512, 64, needs=Needs()),
        "options": problem(
            32, 512, 64, **ids, positives=torch.arange(32), hard_negative_weight=1.0, weight=torch.ones(32)
        ),
        "exclude": problem(32, 512, 64, **ids, exclude_above=0.1, hard_negative_weight=1.0),
        "hardness": problem(32, 512, 64, form="infonce", hard_negative_weight=1.0, **hardness),
        "exclude each": problem(32, 512, 64, **each, **hardness),
        "maximum": problem(32, 512, 64, temperature=0.01),
        "tensors": problem(32, 512, 64, **tensors),
        "many keys": problem(8, 4096, 1024, temperature=0.01),
        "one": problem(1, 1, 1),
        "directions": problem(32, 64, 64, directions="qd qq dq dd", exclude_above=0.1),
        "log-sums": problem(32, 512, 64, form="infonce", output="negatives", **ids),
        "symmetric": problem(32, 32, 64, symmetric=True),
        "symmetric infonce": problem(32, 32, 64, symmetric=True, form="infonce", hardness=1.0, **each),
        "symmetric ids": problem(32, 32, 64, symmetric=True, query_ids=square["query_ids"], key_ids=square["key_ids"]),
        "symmetric options": problem(32, 32, 64, **{**tensors, **square}),
    }


def distillations(dtype: torch.dtype) -> dict[str, Distillation]:
    def problem(B: int, D: int, teachers: torch.dtype, *cut: Any, **options: Any) -> Distillation:
        z, e = torch.randn(B, D).to(dtype), [torch.randn(B, n).to(teachers) for n in (D, 40)]
        return Distillation(z, e, [0.25, 0.75], grouping=Grouping(*cut), need=True, **options)

    tensors = {"seed": torch.tensor(7), "weight": torch.ones(64)}
    logits = {"logits": torch.randn(512, 512), "teacher_temperature": 0.05}
    return {
        "sample mass": problem(512, 64, dtype, "mass", 0.1, seed=-(2**40) - 1),
        "sample size": problem(512, 64, torch.bfloat16, "size", 16.0, divergence="kl", seed=3),
        "sample span": problem(64, 64, torch.float32, "span", 2.0, 9, divergence="js", **tensors),
        "expected mass": problem(512, 64, torch.float64, "mass", 0.1, shuffle="expected"),
        "expected size": problem(4100, 64, dtype, "size", 16.0, shuffle="expected", divergence="kl"),
        "expected span": problem(515, 35, dtype, "span", 2.0, 9, shuffle="expected", divergence="js"),
        "logits": problem(512, 64, dtype, "mass", 1.0, shuffle="none", divergence="js", **logits),
        "forward": dataclasses.replace(problem(65, 33, dtype, "mass", 0.1), need=False),
        "one pair": problem(2, 1, dtype, "mass", 0.6),
    }


def products(dtype: torch.dtype) -> None:
    """The sparse products by blocks of each size, under bits, and where nothing is aligned."""
    global label
    mask = torch.ones(128, 192, dtype=torch.bool)
    x, w, dy, bias = (torch.ones(*size, dtype=dtype) for size in ((2048, 192), (128, 192), (2048, 128), (128,)))
    for T in (2048, 16) if dtype == torch.bfloat16 else (2048,):
        for block in (1, 16, 32, 64):
            label = f"{TYPES[dtype]:5} block{block}, {T} tokens"
            pattern = Pattern.from_mask(mask, block)
            sparse.linear(x[:T], w, bias, pattern)
            sparse.dx(dy[:T], w, pattern)
            sparse.dw(dy[:T], x[:T], pattern)  # 2048 tokens split
    label = f"{TYPES[dtype]:5} sparse, ragged"
    bits = pack_mask(mask[:67, :35])
    sparse.masked(x[:33, 1:36], w[:67, 1:36], bits, None)
    sparse.masked_dx(dy[:33, 1:68], w[:67, 1:36], bits)
    sparse.masked_dw(dy[:33, 1:68], x[:33, 1:36], bits)


def gather(arch: int) -> None:
    """Fills ``launches`` for one architecture: every problem, with every tile of the GEMM."""
    global label
    for dtype in DTYPES:
        for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
            torch.set_float32_matmul_precision(precision)
            for name, p in problems(dtype).items():
                label = f"{TYPES[dtype]:5} {name}"
                for processors in (1, 4, 8):  # takes the largest, the middle and the smallest tile for 512 keys
                    backend.device_properties = lambda device, n=processors: (arch, n)
                    backend.contrastive(p)
                    if arch >= 90 and name in ("plain", "symmetric"):
                        backend.tile = lambda *a, **k: PLAIN_TILE(*a, **k)._replace(copied=True)
                        backend.contrastive(p)
                        backend.tile = PLAIN_TILE
        for name, p in problems(dtype).items():
            label = f"{TYPES[dtype]:5} lengths, {name}"
            if name in LENGTHS and dtype != torch.float64:
                dims = several(p.z1.shape[1], 16 if name == "options" else 5)
                lengths = Lengths(dims, [1.0] * len(dims))
                lengths_driver.matryoshka(p, lengths, backend.contrastive, prefixes.Kernels, False)
        for name, d in distillations(dtype).items():
            label = f"{TYPES[dtype]:5} distill, {name}"
            distillation.distill(d)
        for name, s in labelled(dtype).items():
            label = f"{TYPES[dtype]:5} supervised, {name}"
            classes.supervised(s)
        for name, a in angular(dtype).items():
            label = f"{TYPES[dtype]:5} adapacse, {name}"
            angles.adapacse(a)
        for name, g in sigmoids(dtype).items():
            label = f"{TYPES[dtype]:5} sigmoid, {name}"
            pairs.sigmoid(g)
        for name, u in hyperspheres(dtype).items():
            label = f"{TYPES[dtype]:5} uniformity, {name}"
            hypersphere.uniformity(u)
            hypersphere.alignment(Alignment(u.z, u.z, needs=(True, True)))
    for dtype in DTYPES:
        for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
            torch.set_float32_matmul_precision(precision)
            products(dtype)


def several(D: int, K: int) -> list[int]:
    """Up to K lengths of embeddings with D features."""
    return sorted({max(1, D * k // K) for k in range(1, K + 1)})


def labelled(dtype: torch.dtype) -> dict[str, Supervised]:
    def problem(B: int, N: int, D: int, temperature: Any = 0.05, **options: Any) -> Supervised:
        z, ids = torch.randn(max(B, N), D).to(dtype), torch.arange(max(B, N)) // 3
        base: dict[str, Any] = {"weight": None, "needs": SupervisedNeeds(True, True)}
        return Supervised(z[:B], z[:N], temperature, **{**base, "ids1": ids[:B], "ids2": ids[:N], **options})

    tensors = {"weight": torch.ones(32), "needs": SupervisedNeeds(True, True, True, True)}
    return {
        "keys": problem(32, 512, 64),
        "rows": problem(515, 515, 35, ids2=None, inside=True),
        "maximum": problem(32, 512, 64, 0.01, inside=True),
        "tensors": problem(32, 512, 64, torch.tensor(0.05), **tensors),
        "many keys": problem(8, 4096, 64, 0.01),
        "forward": problem(1, 1, 1, needs=SupervisedNeeds()),
    }


def angular(dtype: torch.dtype) -> dict[str, Angular]:
    def problem(B: int, N: int, D: int, temperature: Any = 0.05, **options: Any) -> Angular:
        z1, z2 = torch.randn(B, D).to(dtype), torch.randn(N, D).to(dtype)
        teacher = {"guide_queries": torch.randn(B, 40).to(dtype), "guide_keys": torch.randn(N, 40).to(dtype)}
        base: dict[str, Any] = {"needs": AngularNeeds(True, True), "positives": None}
        return Angular(z1, z2, temperature, **{**base, **teacher, **options})

    ids = {"query_ids": torch.arange(32), "key_ids": torch.arange(512), "positives": torch.arange(32)}
    logits = {"guide_queries": None, "guide_keys": None, "guide_logits": torch.rand(33, 515)}
    tensors = {"weight": torch.ones(32), "needs": AngularNeeds(True, True, True, True)}
    return {
        "plain": problem(32, 512, 64),
        "ragged": problem(33, 515, 35, **logits),
        "ids": problem(32, 512, 64, **ids),
        "tensors": problem(32, 512, 64, torch.tensor(0.05), **tensors),
        "many keys": problem(8, 4096, 64, 0.01),
        "forward": problem(1, 1, 1, needs=AngularNeeds()),
    }


def sigmoids(dtype: torch.dtype) -> dict[str, Sigmoid]:
    def problem(B: int, N: int, D: int, scale: Any = 10.0, bias: Any = -10.0, **options: Any) -> Sigmoid:
        z1, z2 = torch.randn(B, D).to(dtype), torch.randn(N, D).to(dtype)
        return Sigmoid(z1, z2, scale, bias, **{"needs": SigmoidNeeds(True, True), **options})

    tensors = {"weight": torch.ones(32), "needs": SigmoidNeeds(True, True, True, True, True)}
    return {
        "plain": problem(32, 512, 64),
        "ragged": problem(33, 515, 35, positives=torch.arange(33)),
        "ids": problem(32, 512, 64, query_ids=torch.arange(32), key_ids=torch.arange(512)),
        "tensors": problem(32, 512, 64, torch.tensor(10.0), torch.tensor(-10.0), **tensors),
        "many keys": problem(8, 4096, 64),
        "forward": problem(1, 1, 1, needs=SigmoidNeeds()),
    }


def hyperspheres(dtype: torch.dtype) -> dict[str, Uniformity]:
    return {
        "rows": Uniformity(torch.randn(512, 64).to(dtype), 2.0, need=True),
        "ragged": Uniformity(torch.randn(515, 35).to(dtype), 40.0, need=True),
        "forward": Uniformity(torch.randn(2, 1).to(dtype), 2.0, normalize=False),
    }


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def tensor_cores(arch: int, name: str, given: dict[str, Any], asm: dict[str, str]) -> str | None:
    """What a product's machine code lacks: on sm_90 whole warpgroups multiply (wgmma) while the next operands are on
    their way, on sm_80 warps (mma.sync). None where tensor cores have no such type, or a tile is too low for a
    warpgroup."""
    types = {t.dtype for t in given.values() if isinstance(t, torch.Tensor)}
    described = [t.base.dtype for t in given.values() if hasattr(t, "block_shape")]
    types.update(described)
    if given.get("PRECISION") is None or torch.float64 in types:
        return None
    if torch.bfloat16 not in types and given["PRECISION"] != "tf32":
        return None
    if arch < 90:
        return None if "mma.sync" in asm["ptx"] else "has no mma.sync"
    high = (
        given["BLOCK_M"]
        if name in FUSED
        else given["BLOCK"]
        if name == "dw"
        else given.get("TOKENS", given.get("HIGH"))
    )
    if high < 64:
        return None if "mma.sync" in asm["ptx"] else "has no mma.sync"
    if "ttng.warp_group_dot " not in asm["ttgir"] or "wgmma.mma_async" not in asm["ptx"]:
        return "has no wgmma"
    if described and "cp.async.bulk.tensor" not in asm["ptx"]:
        return "copies no tile by hardware"
    aligned = not any(isinstance(given.get(n), int) and given[n] % 16 for n in ("D", "ld1", "ld2"))
    if name in (*FUSED, "linear", "dx", "dw") and aligned and "pendings = 1" not in asm["ttgir"]:
        return "waits for each product before it begins the next"
    return None


@dataclasses.dataclass
class Usage:
    count: int = 0
    registers: int = 0
    stack: int = 0
    shared: int = 0


def check(arch: int) -> list[str]:
    launches.clear()
    gather(arch)
    problems_found, seen, table = [], set(), {}
    for where, fn, given, options in launches:
        src = source(fn, given)
        key = (src.hash(), str(options))
        if key in seen:
            continue
        seen.add(key)
        try:
            compiled = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)
        except Exception as error:
            problems_found.append(f"sm_{arch} {where}: {fn.__name__} {src.signature} does not compile: {error}")
            continue
        used = resources(compiled.asm["cubin"])
        name = f"{where[:5]} {fn.__name__}"
        if fn.__name__ in FUSED:
            name += " {PRECISION} {BLOCK_M}x{BLOCK_N}x{BLOCK_K}".format(**given)
            name += " w{num_warps} s{num_stages}".format(**options)
            name += " copied" if hasattr(given["z1hat"], "block_shape") else ""
        elif "PRECISION" in given:
            name += " {PRECISION}".format(**given) + "".join(
                f" {k}{given[k]}" for k in ("BLOCK", "TOKENS") if k in given
            )
        # ptxas may give up two to four registers of these for one more block on a multiprocessor. Nothing is hot in
        # fp64.
        hot = fn.__name__ in (*FUSED, "columns", "symmetric") or fn is backend.row_kernels.rows
        least = 0 if hot else 16
        if name[:4] != "fp64" and max(used["STACK"], used["LOCAL"]) > least:
            problems_found.append(f"sm_{arch} {where}: {name} spills {used['STACK']} bytes")
        shared = compiled.metadata.shared
        if shared > SHARED_KB[arch] << 10:
            problems_found.append(f"sm_{arch} {where}: {name} asks for {shared} bytes of shared memory")
        missing = tensor_cores(arch, fn.__name__, given, compiled.asm)
        if missing:
            problems_found.append(f"sm_{arch} {where}: {name} {missing}")
        row = table.setdefault(name, Usage())
        row.count += 1
        row.registers = max(row.registers, used["REG"])
        row.stack = max(row.stack, used["STACK"], used["LOCAL"])
        row.shared = max(row.shared, shared)
    print(f"sm_{arch}: kernel, variants compiled, most registers, stack bytes, shared bytes")
    for name, u in sorted(table.items()):
        print(f"  {name:56} {u.count:3} {u.registers:4} {u.stack:5} {u.shared:7}")
    return problems_found


def main() -> int:
    triton.runtime.jit.JITFunction.run = record
    begin = time.perf_counter()
    failures = [failure for arch in map(int, sys.argv[1:] or (80, 90)) for failure in check(arch)]
    print(f"triton {triton.__version__}, {time.perf_counter() - begin:.0f} s")
    print("\n".join(failures) or "all compile, products on tensor cores, spills within limits")
    return len(failures) > 0


if __name__ == "__main__":
    sys.exit(main())
