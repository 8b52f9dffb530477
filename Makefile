# Every target makes and keeps up its own .venv: nothing has to be installed before but Python 3.10 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is installed is remembered by the content of pyproject.toml, so that a second call does nothing.
KEY := $(shell cksum < pyproject.toml | tr ' ' '-')
STAMP := $(VENV)/.installed-$(KEY)
# Two test processes with one thread each are faster than one with two: tiny models cannot feed two threads.
WORKERS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow tutorials check format bench bench-quick bench-classify docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

demo: $(STAMP)-demo ## a real model, tuned on real chats, answers before and after (under 10 minutes on two cores)
	@$(BIN)/python scripts/demo.py

test: $(STAMP)-test ## the test suite; ARGS="tests/cli -x" for a part of it
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(STAMP)-test ## before a release: other families and kinds, kills, real models
	TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -m slow $(ARGS)

check: $(STAMP)-dev ## what a change has to pass: lint, format, types, layers, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory test

tutorials: $(STAMP)-test ## every block of docs/tutorials, its numbers within the ranges that it states; ARGS="comments" for one page
	$(BIN)/python scripts/tutorials.py $(ARGS)

docs: $(STAMP)-docs ## the pages as a site with search, in site/; any dead link fails
	$(BIN)/python -m mkdocs build --strict

format: $(STAMP)-dev ## put the code into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)-test ## training beside other tools: MODEL=folder ROWS="chat train.jsonl test.jsonl" ARGS="--rounds 5"
	@$(BIN)/python -m benchmarks.environments .peers
	@$(BIN)/python -m benchmarks train --model '$(MODEL)' --rows $(ROWS) --work .peers/raced $(ARGS)

bench-quick: $(STAMP)-demo ## time one epoch of the example chats on this machine
	@$(BIN)/python scripts/bench.py

bench-classify: $(STAMP)-demo ## beside transformers.Trainer: MODEL=folder TRAIN=train.csv EVAL=test.csv ARGS="--out table.md"
	@$(BIN)/python -m benchmarks classify --model '$(MODEL)' --train '$(TRAIN)' --eval '$(EVAL)' $(ARGS)

clean: ## remove the environment and caches; runs and models stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(STAMP)-demo: EXTRA :=
$(STAMP)-test: EXTRA := [test]
$(STAMP)-dev: EXTRA := [test,dev]
$(STAMP)-docs: EXTRA := [docs]

$(STAMP)-demo $(STAMP)-test $(STAMP)-dev $(STAMP)-docs:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Tunesmith needs Python 3.10 or newer; $(PYTHON) is older. Say which: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }; }
	@echo "installing tunesmith$(EXTRA) into $(VENV) (torch is large: this takes a few minutes once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.$(EXTRA)'
	@touch $@
