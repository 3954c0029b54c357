# The habits of this repository; `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Tried in this order; `make setup PYTHON=python3.12` names another.
PYTHON := python3 python3.13 python3.12 python3.11 python3.14
PYTHON_IMAGE ?= python:3.11-slim
# Further arguments: `make demo ARGS="--seconds 60"`, `make test ARGS="-k takeover"`.
ARGS ?=

.PHONY: help
help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s  %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: $(VENV)/dev.stamp ## Make .venv with all that the targets below need (each of them does so by itself)

.PHONY: demo
demo: $(VENV)/demo.stamp ## Show it: the whole system on this machine, a crash and an outage, and the reconciliation
	@$(BIN)/dataplane demo $(ARGS)

.PHONY: test
test: $(VENV)/dev.stamp ## Run every test (embedded Valkey, and redis-server where it is installed)
	@$(BIN)/pytest $(ARGS)

.PHONY: chaos
chaos: $(VENV)/demo.stamp ## Try to break it, with real processes (ARGS="--seed 1 2 3 --minutes 30", "--list", docs/reliability.md)
	@$(BIN)/python -m sandbox.chaos $(ARGS)

.PHONY: check
check: $(VENV)/dev.stamp ## Run the quick gate: lint, format, types, import rules, unit tests
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/pytest tests/unit

.PHONY: bench
bench: $(VENV)/bench.stamp ## Measure it beside a bare loop and its peers (ARGS="--quick", "--publish", benchmarks/README.md)
	@$(BIN)/python -m benchmarks $(ARGS)

.PHONY: simulate
simulate: $(VENV)/dev.stamp ## Play lives of the core under a virtual clock, each seed another (ARGS="--seeds 2000", "--seed 7 --verbose")
	@$(BIN)/python -m simulation --seeds 150 $(ARGS)

.PHONY: mutations
mutations: $(VENV)/dev.stamp ## Take one safety rule after the other out of a copy, and see which seed notices (docs/mutations.md)
	@$(BIN)/python -m simulation.mutations $(ARGS)

.PHONY: image
image: ## Build the container image dataplane-agent (PYTHON_IMAGE names its base)
	docker build --network host --build-arg PYTHON_IMAGE=$(PYTHON_IMAGE) --tag dataplane-agent .

.PHONY: lock
lock: $(VENV)/lock.stamp ## Pin the dependencies: requirements/*.lock from pyproject.toml (ARGS=--upgrade: anew)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])' \
	  | $(COMPILE) --output-file requirements/build.lock -
	$(COMPILE) --output-file requirements/dev.lock --extra sandbox --extra test --extra check --extra simulate pyproject.toml
	$(COMPILE) --output-file requirements/bench.lock --constraint requirements/dev.lock --extra sandbox --extra bench pyproject.toml
	$(COMPILE) --output-file requirements/demo.lock --constraint requirements/dev.lock --extra sandbox pyproject.toml
	$(COMPILE) --output-file requirements/runtime.lock --constraint requirements/dev.lock pyproject.toml

# Universal: one lock for every Python since 3.11.0 and every platform, with markers where they differ.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command 'make lock' $(ARGS)

.PHONY: clean
clean: ## Remove .venv and everything else that was made here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in $(PYTHON); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo 'make: this needs a Python 3.11 to 3.14 that has its venv module (on Debian the package python3-venv); none of these is one: $(PYTHON).' >&2; \
	echo 'make: install one, or name it: make setup PYTHON=python3.12' >&2; exit 1

# The demo needs less than the tests, so that it starts sooner.
$(VENV)/demo.stamp: requirements/build.lock requirements/demo.lock pyproject.toml | $(BIN)/python
	@echo 'Installing requirements/demo.lock into $(VENV)'
	@$(PIP) install --quiet --require-hashes -r requirements/build.lock -r requirements/demo.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.lock $(VENV)/demo.stamp
	@echo 'Installing requirements/dev.lock into $(VENV)'
	@$(PIP) install --quiet --require-hashes -r requirements/dev.lock
	@touch $@

$(VENV)/bench.stamp: requirements/bench.lock $(VENV)/demo.stamp
	@echo 'Installing requirements/bench.lock into $(VENV)'
	@$(PIP) install --quiet --require-hashes -r requirements/bench.lock
	@touch $@

$(VENV)/lock.stamp: | $(BIN)/python
	@$(PIP) install --quiet 'uv>=0.13,<1'
	@touch $@
