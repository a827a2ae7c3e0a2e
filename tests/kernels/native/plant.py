"""Plants faults in a copy of the kernels, one at a time, and runs the native checks: each has to be caught.

By hand, `python tests/kernels/native/plant.py [name ...]`, after a change of the checks or of `make sanitize`; half a minute
each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ADDRESS, UNDEFINED, THREADS, VALUES = "address", "undefined", "thread", "values"


@dataclass
class Fault:
    instrument: str
    file: str
    before: str
    after: str
    isa: str = "portable"


FAULTS = {
    "the ragged tail reads one key more": Fault(
        ADDRESS, "rows.h", "k < n; ++k) {\n      tail[k] =", "k <= n; ++k) {\n      tail[k] ="
    ),
    "a product reads one key row more": Fault(
        ADDRESS, "small_products.h", "std::min(j + k, N - 1)", "std::min(j + k, N)"
    ),
    "lanes take one token more": Fault(
        ADDRESS, "transpose.h", "std::min<int64_t>(W, n - t))", "std::min<int64_t>(W, n - t + 1))"
    ),
    "scratch for one thread less": Fault(
        ADDRESS, "block_sparse.h", "packed(threads * most", "packed((threads - 1) * most"
    ),
    "half as many buckets as are used": Fault(ADDRESS, "shuffle.h", "bucket_(2 * n)", "bucket_(n)"),
    "a mask's last word is whole": Fault(ADDRESS, "sparse.h", "int(in - k * 32)", "32"),
    "transposed rows in too little scratch": Fault(
        ADDRESS, "norms.h", "buffers(threads * kTransposed * D)", "buffers(threads * kTransposed * (D - 1))"
    ),
    "work that is a row's numbers short": Fault(ADDRESS, "problem.h", "return 3 * B + N", "return 2 * B + N"),
    "a negative number is shifted": Fault(UNDEFINED, "distill.h", "uint32_t(exponent) << 23", "exponent << 23"),
    "a product of keys is not widened": Fault(
        UNDEFINED,
        "shuffle.h",
        "++bucket_[uint64_t(key_[k]) * buckets >> 32]",
        "++bucket_[uint32_t(int32_t(key_[k]) * int32_t(buckets)) % buckets]",
    ),
    "no barrier before the rows' losses": Fault(
        THREADS, "small.h", "#pragma omp barrier\n    const bool ok", "    const bool ok"
    ),
    "no barrier before dz2": Fault(
        THREADS, "small.h", "#pragma omp barrier\n      product(S, 1, N", "      product(S, 1, N"
    ),
    "no barrier before dz of a distillation": Fault(
        THREADS, "small_distill.h", "#pragma omp barrier\n    if (dz && ok)", "    if (dz && ok)"
    ),
    "no barrier behind the copied panels": Fault(
        THREADS,
        "block_sparse.h",
        "#pragma omp for schedule(static)\n    for (int64_t k = 0; k < panels",
        "#pragma omp for schedule(static) nowait\n    for (int64_t k = 0; k < panels",
    ),
    "no barrier between the steps of packing": Fault(
        THREADS,
        "unstructured.h",
        "#pragma omp for schedule(static)\n  for (int64_t o = 0; o < p.out",
        "#pragma omp for schedule(static) nowait\n  for (int64_t o = 0; o < p.out",
    ),
    "threads share their scratch": Fault(
        THREADS, "block_sparse.h", "packed.get() + thread_index() * most", "packed.get() + 0 * most"
    ),
    "threads share a distillation's scratch": Fault(THREADS, "distill.h", "scratch[thread_index()]", "scratch[0]"),
    "a flag is written by all threads": Fault(THREADS, "small.h", "#pragma omp atomic write\n", ""),
    "no barrier before shared weights are packed again": Fault(
        THREADS,
        "block_tiles.h",
        "#pragma omp barrier\n        for (int64_t r = 0",
        "        for (int64_t r = 0",
        isa="amx",
    ),
    "no barrier behind shared weights": Fault(
        THREADS,
        "block_tiles.h",
        "#pragma omp barrier\n      } else if (t0 < t1)",
        "      } else if (t0 < t1)",
        isa="amx",
    ),
    "columns' sums start from what memory held": Fault(
        VALUES, "small.h", "    std::fill_n(p.column_sum, B, 0.0);\n", ""
    ),
    "tokens past the last are not 0": Fault(
        VALUES, "block_tiles.h", "(padded), 0, sizeof padded", "(padded), 0xff, sizeof padded", isa="amx"
    ),
    "a pair's ragged tail reads one key more": Fault(
        ADDRESS, "sigmoid.h", "k < n; ++k) tail[k] =", "k <= n; ++k) tail[k] ="
    ),
    "the padding has ids": Fault(
        ADDRESS, "sigmoid.h", "k < n; ++k) signs.y[k] = ids[k]", "k < padded; ++k) signs.y[k] = ids[k]"
    ),
    "threads share the signs": Fault(
        THREADS,
        "sigmoid.h",
        "    Signs<acc_t<T>> signs{acc_t<T>(p.bias)};",
        "    static Signs<acc_t<T>> signs{acc_t<T>(p.bias)};",
    ),
    "the padding is of negatives": Fault(
        VALUES, "sigmoid.h", "  for (int64_t k = n; k < padded; ++k) signs.offset[k] = -INFINITY;\n", ""
    ),
    "a class's last key is the next class's": Fault(
        ADDRESS, "supervised.h", "p.keys + p.ptr[p.classes[i] + 1];", "p.keys + p.ptr[p.classes[i] + 1] + 1;"
    ),
    "as many positives as lanes": Fault(ADDRESS, "supervised.h", "T kept[kBlock];", "T kept[kLane];"),
    "threads share the masks": Fault(THREADS, "supervised.h", "    Masks<A> masks;\n", "    static Masks<A> masks;\n"),
    "a positive stays hidden": Fault(VALUES, "supervised.h", "                      masks.show(*k - a);\n", ""),
    "the padding has a teacher": Fault(
        ADDRESS,
        "adapacse.h",
        "  for (int64_t k = 0; k < n; ++k) {\n    A alpha",
        "  for (int64_t k = 0; k < padded; ++k) {\n    A alpha",
    ),
    "every key is turned": Fault(VALUES, "adapacse.h", "s < cos_m ? 2 * half.sin : A(0)", "2 * half.sin"),
    "the padding has a guide": Fault(
        ADDRESS, "rows.h", "k < n; ++k) v[k] = load(t[a + k])", "k < padded; ++k) v[k] = load(t[a + k])"
    ),
    "a guide's rows lie as the panel's": Fault(VALUES, "rows.h", "* panel.ld_T * size", "* panel.ld * size"),
    "a mirrored pair counts once": Fault(
        VALUES, "uniformity.h", "sum += 2 * exponentials_of", "sum += exponentials_of"
    ),
}


# As CMakeLists.txt compiles them for `make sanitize`; one instruction set, chosen here and not by the processor.
COMPILE = ["-std=c++17", "-O1", "-g1", "-w", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
SANITIZE = {"address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "thread": ["-fsanitize=thread"]}
ISAS = {
    "portable": [],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "amx": [
        "-march=x86-64-v4",
        "-mprefer-vector-width=512",
        "-mamx-tile",
        "-mamx-bf16",
        "-include",
        "tests/kernels/native/tiles_model.h",
    ],
}
CHOICE = """#include "kernels/cpu/dispatch.h"
namespace pycse {{
namespace {isa} {{ Kernels kernels(); }}
const Kernels& cpu_kernels() {{
  static const Kernels chosen = {isa}::kernels();
  return chosen;
}}
std::vector<std::string> cpu_instruction_sets() {{ return {{"{isa}"}}; }}
}}  // namespace pycse
"""


class Builder:
    """Compiles in a copy of the sources; what has no fault in it once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.compiler = folder, os.environ.get("CXX", "g++")

    def run(self, *arguments: str) -> None:
        done = subprocess.run([self.compiler, *arguments], cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)

    def compiled(self, source: str, name: str, sanitizer: str, *options: str, again: bool = False) -> str:
        out = f"{name}.{sanitizer}.o"
        if again or not (self.folder / out).exists():
            self.run(*COMPILE, *SANITIZE[sanitizer], *options, "-I.", "-c", source, "-o", out)
        return out

    def kernels(self, isa: str, sanitizer: str, again: bool) -> list[str]:
        source = "kernels/cpu/amx.cpp" if isa == "amx" else "kernels/cpu/isa.cpp"
        found = [self.compiled(source, isa, sanitizer, "-fopenmp", f"-DPYCSE_ISA={isa}", *ISAS[isa], again=again)]
        return [*found, *self.kernels("v4", sanitizer, False)] if isa == "amx" else found

    def forget(self) -> None:
        for path in self.folder.glob("*.o"):
            path.unlink()

    def checks(self, isa: str, sanitizer: str, everything: bool) -> str:
        """everything: the fault is in what the checks include too."""
        choice = self.folder / f"{isa}.cpp"
        choice.write_text(CHOICE.format(isa=isa))
        names = [
            "main",
            "adapacse",
            "contrastive",
            "distill",
            "guide",
            "sigmoid",
            "sparse",
            "supervised",
            *(["team"] if sanitizer == "thread" else []),
        ]
        objects = [self.compiled(f"tests/kernels/native/{n}.cpp", n, sanitizer, again=everything) for n in names]
        objects += [self.compiled(str(choice), f"choice-{isa}", sanitizer), *self.kernels(isa, sanitizer, True)]
        out = f"checks-{isa}-{sanitizer}"
        self.run(*SANITIZE[sanitizer], *objects, "-o", out, "-pthread" if sanitizer == "thread" else "-lgomp")
        return str(self.folder / out)


def plant(fault: Fault, builder: Builder) -> str:
    """What was seen."""
    path = builder.folder / "kernels" / "cpu" / fault.file
    text = path.read_text()
    if fault.before not in text:
        return f"NOT PLANTED: {fault.file} has no {fault.before!r}"
    everything = fault.file == "problem.h"  # the checks include it too
    path.write_text(text.replace(fault.before, fault.after))
    try:
        checks = builder.checks(fault.isa, "thread" if fault.instrument == THREADS else "address", everything)
        options = "malloc_fill_byte=255:max_malloc_fill_size=1073741824:detect_leaks=0"
        done = subprocess.run([checks], env={**os.environ, "ASAN_OPTIONS": options}, capture_output=True, text=True)
    finally:
        path.write_text(text)
        if everything:
            builder.forget()
    said = done.stdout + done.stderr
    marks = {
        ADDRESS: "AddressSanitizer",
        UNDEFINED: "runtime error",
        THREADS: "ThreadSanitizer: data race",
        VALUES: "FAILED",
    }
    seen = [instrument for instrument, mark in marks.items() if mark in said]
    if done.returncode == 0:
        return "MISSED"
    return f"caught by {', '.join(seen) or f'status {done.returncode}'}"


def main(names: list[str]) -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for part in ("kernels", "tests/kernels/native"):
            shutil.copytree(ROOT / part, Path(temporary) / part, ignore=shutil.ignore_patterns("*.so"))
        builder = Builder(Path(temporary))
        for name, fault in FAULTS.items():
            if names and not any(n in name for n in names):
                continue
            start = time.monotonic()
            seen = plant(fault, builder)
            missed += "caught" not in seen
            print(f"{fault.instrument:10} {name}: {seen} ({time.monotonic() - start:.0f} s)", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
