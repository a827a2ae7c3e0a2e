# Everything sets itself up: `make test` and `make train` work in a fresh clone.
#   PYTHON  interpreter to build the virtual environment with (>= 3.10)
#   TORCH   installed before anything that could resolve torch by range; e.g. TORCH="torch==2.11.0" on a GPU machine
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find kernels \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \)) CMakeLists.txt setup.py pyproject.toml

.PHONY: test train lint bench wheel clean
.DELETE_ON_ERROR:

test: $(VENV)/test  ## run the tests
	$(RUN) -m pytest -q

train: $(VENV)/train  ## train a sentence encoder on English Wikipedia; ARGS="--recipe simcse" for options of pycse train
	$(VENV)/bin/pycse train $(ARGS)

lint: $(VENV)/test
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

bench: $(VENV)/test  ## the tables of docs/performance.md
	$(RUN) -m benchmarks.contrastive
	$(RUN) -m benchmarks.distill
	$(RUN) -m benchmarks.uniformity

wheel: $(VENV)/test
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .

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

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/*.so
