# Every target builds the environment it needs; .venv is rebuilt when the lock or the metadata change.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pipeline jobs models tests

.DEFAULT_GOAL := help
.PHONY: help scan test test-all test-gpu bench quality lock

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

scan: $(INSTALLED) ## scan the demo; your own images: .venv/bin/python -m jobs.scan --source s3://bucket/prefix
	$(BIN)/python -m jobs.scan --demo $(ARGS)

test: $(INSTALLED) ## run the quick tests; one file: make test ARGS=tests/test_stages.py
	$(BIN)/python -m pytest $(ARGS)

test-all: $(INSTALLED) ## run the quick and the slow tests
	$(BIN)/python -m pytest -m "not load and not gpu" $(ARGS)

test-gpu: $(INSTALLED) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench: $(INSTALLED) ## run the load tests: throughput on a machine that does nothing else
	@$(BIN)/python -m pytest -m load -s $(ARGS) || { [ $$? -eq 5 ] && echo "there are no load tests yet"; }

quality: $(INSTALLED) ## check format, rules, types and that the lock names no registry
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	@if grep -nE '://|file:|^ *-(-index|-extra|-find|i |f )' requirements.lock; then \
	  echo "requirements.lock names a registry or a path in the lines above; write it again with: make lock" >&2; exit 1; \
	fi

lock: $(INSTALLED) ## resolve pyproject.toml into requirements.lock; newer versions: make lock ARGS=--upgrade
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --fork-strategy fewest \
	  --generate-hashes --no-header --quiet --output-file requirements.lock $(ARGS)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python " + sys.version.split()[0])' || { \
	  echo "dorfman needs Python 3.11 or later; name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "building $(VENV) from requirements.lock: 7 GB, some minutes, once"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
