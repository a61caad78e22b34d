# Needs Python 3.11 or newer and nothing else; `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# Installing also generates the gRPC stubs, so it is done again when one of these changes.
SETUP_INPUTS := pyproject.toml constraints.txt $(wildcard protos/baton/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help run test clean

help:
	@echo "make run     set up if need be, then serve the shipped model (ARGS='--port 9000' for options)"
	@echo "make test    set up if need be, then check style and types and run the tests"
	@echo "make clean   remove what the targets above have made"
	@echo "Set PYTHON to choose another Python: make run PYTHON=python3.12"

run: $(VENV)/ready-to-run
	@exec $(BIN)/baton serve $(ARGS)

test: $(VENV)/ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

clean:
	rm -rf $(VENV) build dist baton/v1/*_pb2*.py baton/v1/*_pb2.pyi .*_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Baton needs Python 3.11 or newer: name one with PYTHON=python3.12" >&2; exit 1; }
	@echo "==> Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)

$(VENV)/ready-to-run: $(SETUP_INPUTS) | $(BIN)/python
	@echo "==> Installing Baton and what it needs into $(VENV); minutes the first time, PyTorch is large"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/ready-to-test: $(SETUP_INPUTS) | $(BIN)/python
	@echo "==> Installing Baton and what its tests need into $(VENV); minutes the first time, PyTorch is large"
	@$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/ready-to-run
