# One runner for everything. `make` lists what there is; each target sets up what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PY := .venv/bin/python
READY := .venv/.ready
ARGS ?=
PYTEST := $(PY) -m pytest

.PHONY: help setup demo fmt lint types unit kernel survival e2e bench docs test ci clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  Options for pytest, the demo or the benchmark go in ARGS, as in: make e2e ARGS="-k abort -x"'

$(READY): pyproject.toml scripts/setup.sh
	@scripts/setup.sh
	@touch $@

setup: $(READY) ## Debian packages and .venv; says what it installs, under a second when nothing is missing

demo: $(READY) ## a redis under load moves between two hosts of the lab (root)
	@$(PY) -m tests.lab.demo $(ARGS)

fmt: $(READY) ## format, and mend what ruff can mend
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

lint: $(READY) types ## ruff, layers, types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/lint-imports

types: $(READY) ## mypy, strict
	@.venv/bin/mypy

unit: $(READY) ## tests that need no privileges, under 30 s
	@$(PYTEST) -m "not (root or kernel or survival or e2e)" $(ARGS)

kernel: $(READY) ## kernel wrappers and constants against this machine's kernel and compiler (root)
	@$(PYTEST) tests/kernel $(ARGS)

survival: $(READY) ## one small program per resource is dumped and restored (root)
	@$(PYTEST) tests/survival $(ARGS)

e2e: $(READY) ## test hosts, agents and the command line (root)
	@$(PYTEST) tests/lab tests/e2e $(ARGS)

bench: $(READY) ## downtime against memory, dirty rate and link (root)
	@$(PY) -m benchmarks.downtime $(ARGS)

docs: $(READY) ## write the reference pages that are made from the code
	@$(PY) docs/generate.py

test: $(READY) lint ## everything that must pass: lint, then all suites with one closing summary (root)
	@$(PYTEST) $(ARGS)

ci: test ## what .ci/run calls

clean: ## remove caches; .venv stays
	@rm -rf .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
