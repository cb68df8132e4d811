# make help lists the targets. Everything runs from .venv, which holds exactly what requirements.lock pins.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= quickstart
# Tests on Ray of the first process: those of faults, those that share a trained run, and a sweep, so that both take as long.
LONG := tests/cluster tests/common tests/eval tests/faults tests/runs tests/sweep/test_sweep_runs.py tests/train
# Tests without Ray that the first process runs, too: with them both processes take as long.
BESIDE := tests/benchmarks tests/demo tests/export tests/search tests/serve tests/storage
# All threads' stacks, where a process dies of a signal.
export PYTHONFAULTHANDLER := 1
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup quickstart demo check test long-tests other-tests lint format docs lock bench soak

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.done ## Make .venv with uv from the pinned, hashed requirements.lock.

$(VENV)/.done: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "nev needs Python 3.11 or newer: apt-get install python3 python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes --compile-bytecode --quiet -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --quiet -e .
	@touch $@

quickstart: setup ## Draw pictures, train a vision encoder into MiniLM's space, show what it learnt.
	$(BIN)/nev quickstart --config $(CONFIG)

demo: setup ## Search the quickstart's pictures in a browser; trains its model first where there is none.
	$(BIN)/nev demo $(ARGS)

# A thread a process: two processes share the cores.
check long-tests other-tests: export OMP_NUM_THREADS := 1

check: setup ## Run the quick tests: no Ray, no network, nothing slow.
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not slow"

test: setup ## Run all tests, in two processes. NEV_DATA=folder adds those that read real data.
	@echo "Two processes run the tests; each prints its results when it is done."
	@$(MAKE) --jobs 2 --output-sync=recurse --no-print-directory long-tests other-tests

long-tests: setup
	@failed=0; \
	$(BIN)/python -m pytest -m ray $(LONG) || failed=1; \
	$(BIN)/python -m pytest -m "not ray" $(BESIDE) || failed=1; \
	exit $$failed

other-tests: setup
	@failed=0; \
	$(BIN)/python -m pytest -m "not ray" $(addprefix --ignore=,$(BESIDE)) || failed=1; \
	$(BIN)/python -m pytest -m ray $(addprefix --ignore=,$(LONG)) || failed=1; \
	exit $$failed

lint: setup ## ruff format and check, mypy --strict.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## Apply ruff's formatting and safe fixes.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup ## Build the docs site into site/, from docs/ and the docstrings.
	$(BIN)/uv pip install --python $(BIN)/python --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock: setup ## Pin requirements.lock anew from pyproject.toml.
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --no-header --upgrade --group dev pyproject.toml -o requirements.lock

bench: setup ## Run benchmarks/NAME.py (make bench NAME=train); writes benchmarks/results/NAME.json.
	@test -n "$(NAME)" || { echo "name a benchmark: make bench NAME=train"; ls benchmarks/*.py; exit 1; }
	$(BIN)/uv pip install --python $(BIN)/python --quiet --group bench
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)

soak: setup ## Kill things under runs for half an hour (make soak ARGS="--minutes 5"); writes benchmarks/results/faults.json.
	$(BIN)/python benchmarks/soak.py $(ARGS)
