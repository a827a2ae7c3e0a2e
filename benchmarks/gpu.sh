#!/usr/bin/env bash
# Everything to do on a machine with a GPU: build, GPU tests, benchmarks and tuner, compute-sanitizer; in $GPU_SECONDS,
# by default just under 9 minutes.
#
#   bash benchmarks/gpu.sh [--check-only | --bench-only | --dry-run]
#
# Uses the python3 on PATH (or PYTHON), whose torch has CUDA, and no network; wheels in .whl (of peers to measure, say)
# are put where this run alone finds them. Results go to $OUT, or else to benchmarks/results: gpu-DATE.json and .md, and
# logs. What an earlier run of this commit has measured is taken from there: --bench-only in a second, shorter run goes
# on where the first was cut off. --dry-run rehearses all of it on any machine: tests are collected, the benchmarks run
# in tiny on the processor, and what needs a GPU or a compiler is printed instead.
# Each stage has a time limit, and the next begins whatever the one before it came to; the exit status counts failed
# stages.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mode=${1:-all}
case $mode in
all | --check-only | --bench-only | --dry-run) ;;
*)
  echo "usage: bash benchmarks/gpu.sh [--check-only | --bench-only | --dry-run], not $mode" >&2
  exit 2
  ;;
esac
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
rm -f "$out"/{build,tests,sanitizer,bench}.log{,.part}
# cmake and ninja may have come with pip: they stand beside that Python. nvcc may not be on PATH.
PATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH:/usr/local/cuda/bin"
# The build's folder stays, so that the next run compiles what has changed.
export PATH PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1 PYCSE_BUILD=$PWD/build/gpu
failed=0
begin=$SECONDS

# Seconds that are left, less $1; at least $2.
left() {
  local seconds=$((${GPU_SECONDS:-535} - (SECONDS - begin) - $1))
  echo $((seconds > $2 ? seconds : $2))
}

# stage NAME SECONDS COMMAND...: runs the command under the limit, its output added to $out/$log.log (or NAME.log) and
# the end of it here.
stage() {
  local name=$1 limit=$2 file=$out/${log:-$1}.log start=$SECONDS status ended=(--kill-after=5)
  shift 2
  # As by a keyboard: a test run then says what failed so far.
  [ "$name" = tests ] && ended=(--foreground --signal=INT --kill-after=15)
  echo "== $name (at most $limit s): $*"
  timeout "${ended[@]}" "$limit" "$@" >"$file.part" 2>&1
  status=$?
  tail -n "${lines:-12}" "$file.part"
  { echo "== $name: $*" && cat "$file.part"; } >>"$file"
  rm "$file.part"
  case $status in
  0) echo "== $name: done in $((SECONDS - start)) s" ;;
  124 | 137) echo "== $name: STOPPED at its limit of $limit s" ;;
  *) echo "== $name: FAILED with status $status after $((SECONDS - start)) s, see $file" ;;
  esac
  [ $status -eq 0 ] || failed=$((failed + 1))
  return $status
}

# What a real run would do and this one only says.
rehearse() { echo "== $1 (at most $2 s) would run: ${*:3}"; }

if compgen -G ".whl/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .whl/*.whl &&
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

"$python" - "$mode" <<'PY' || exit 1
import importlib.metadata, importlib.util, shutil, sys

dry = sys.argv[1] == "--dry-run"
try:
    import torch
except ImportError:
    sys.exit(f"{sys.executable} has no torch: put the Python whose torch has CUDA first on PATH, or name it in PYTHON")
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
if not dry and not torch.cuda.is_available():
    sys.exit("No GPU is available to this torch: nothing can be measured here. --dry-run rehearses without one.")
missing = [n for n in ("pip", "setuptools", "pybind11") if importlib.util.find_spec(n) is None]
if "setuptools" not in missing and int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
    missing.append("setuptools >= 77")
missing += [n for n in ("cmake", "ninja", "c++") if shutil.which(n) is None]
if missing:
    message = f"The build needs {', '.join(missing)}, which this machine lacks; they have to be brought (pip install)."
    print(message) if dry else sys.exit(message)
if shutil.which("nvcc") is None:
    print("No nvcc on PATH: backend 'cuda' is left out, 'triton' is tested and measured.")
PY

arch=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
print(f"{major}{minor}{chr(97) if major >= 9 else str()}-real")')
export PYCSE_CUDA_ARCHS=${PYCSE_CUDA_ARCHS:-$arch}
build=("$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .)
pytest=("$python" -m pytest -q -m gpu -p no:cacheprovider -W ignore::UserWarning)
if "$python" -c 'import xdist' 2>/dev/null; then pytest+=(-n 12); fi
# A kernel that never ends: its worker dies, is named, and another takes its place.
if "$python" -c 'import pytest_timeout' 2>/dev/null; then pytest+=(--timeout 60 --timeout-method thread); fi
exercise=("$python" -m benchmarks.gpu --exercise)
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)

if [ "$mode" = --dry-run ]; then
  rehearse build 200 env "PYCSE_CUDA_ARCHS=$arch" "${build[@]}"
  lines=4 stage tests 120 "$python" -m pytest -q -m gpu --collect-only -p no:cacheprovider
  OMP_NUM_THREADS=1 lines=60 stage bench 180 "$python" -m benchmarks.gpu --dry-run --fresh --out "$out"
  OMP_NUM_THREADS=1 log=sanitizer stage exercise 60 "${exercise[@]}" --dry-run
  for tool in memcheck racecheck; do rehearse "$tool" 90 "$sanitizer" --tool "$tool" "${exercise[@]}"; done
else
  queried=name,driver_version,clocks.sm,clocks.max.sm,temperature.gpu,utilization.gpu
  nvidia-smi --query-gpu=$queried --format=csv || true
  # Without the CUDA kernels Triton's are still measured.
  stage build 200 "${build[@]}" || PYCSE_CUDA=0 stage build 150 "${build[@]}" || exit 1
  # What ptxas said of each CUDA kernel of this build.
  find build -path '*ptxas/*.txt' -exec cat {} + >>"$out/build.log" 2>/dev/null
  "$python" -c 'import pycse; print(pycse.info())'
  if [ "$mode" != --bench-only ]; then
    OMP_NUM_THREADS=2 lines=40 stage tests 170 "${pytest[@]}" tests/backends/cuda tests/backends/triton
  fi
  if [ "$mode" != --check-only ]; then
    after=$([ "$mode" = all ] && echo 100 || echo 0)  # for the sanitizer
    limit=$(left "$after" 60)
    lines=60 stage bench "$limit" "$python" -m benchmarks.gpu --out "$out" --seconds "$((limit - 30))"
  fi
  if [ "$mode" != --bench-only ]; then
    # Once without the sanitizer: what Triton compiles is kept for the runs under it.
    log=sanitizer stage exercise 60 "${exercise[@]}"
    if [ -x "$sanitizer" ]; then
      # PyTorch's allocator would hide an access past the end of a tensor.
      for tool in memcheck racecheck; do
        limit=$(left 0 30)
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 log=sanitizer stage "$tool" "$((limit < 120 ? limit : 120))" \
          "$sanitizer" --tool "$tool" --error-exitcode 9 "${exercise[@]}"
      done
    else
      echo "== no compute-sanitizer on this machine: memcheck and racecheck are left out"
    fi
  fi
fi
echo "== $((SECONDS - begin)) s in all, $failed stages failed, results in $out"
exit "$failed"
