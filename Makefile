SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Torch is pinned to one exact version; everything else to what was tested with it.
STAMP := $(VENV)/.installed

# Tests of seconds, on all cores: quick ones spread evenly, slow ones by file, for they share what a file sets up.
# Those that start servers and clusters want the machine for themselves.
IN_PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8

# Of unit tests, those that `make test` runs; .ci/run leaves out what `make check` has run.
UNITS ?= not soak

.PHONY: help train-all test check soak bench audit ui lock clean

help:  ## this list
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.venv: $(STAMP)  ## the environment, from requirements.lock

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; say make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --config-settings editable_mode=compat --editable '.[dev]'
	@touch $(STAMP)

train-all: $(STAMP)  ## prepare, train, score, compare, promote: the main job
	$(BIN)/speck train-all

test: $(STAMP)  ## all tests but the soak tier
	$(IN_PARALLEL) --dist loadfile tests/unit tests/contracts tests/golden tests/gpu -m "$(UNITS)"
	$(BIN)/python -m pytest tests/integration -m "not soak"

check: $(STAMP)  ## format, lint, types, import rules, quick unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(IN_PARALLEL) --dist worksteal tests/unit tests/contracts -m "not soak and not slow"

soak: $(STAMP)  ## kill series, races and large matrices
	$(BIN)/python -m pytest -m soak

bench: $(STAMP)  ## speed, as ratios within one run
	PYTHONPATH=tests $(BIN)/python -m tests.bench

audit: $(STAMP)  ## known vulnerabilities of the locked packages (needs a network)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --requirement requirements.lock --no-deps --disable-pip

ui: $(STAMP)  ## MLflow and Prefect pages over what the runs left
	$(BIN)/python -m infra.ui --home $${SPECK_HOME:-.speck}

lock: $(STAMP)  ## rewrite requirements.lock from the environment
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
