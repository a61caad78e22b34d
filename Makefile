# Needs Python 3.11 or newer and nothing else; `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# Tests of one file share servers and compiled kernels, so a file stays with one process.
PYTEST := $(BIN)/pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

# Installing also generates the gRPC stubs, so it is done again when one of these changes.
SETUP_INPUTS := pyproject.toml constraints.txt $(wildcard protos/baton/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help run check test clean image compose compose-down test-compose

help:
	@echo "make run     set up if need be, then serve the shipped model (ARGS='--port 9000' for options)"
	@echo "make check   style, types and the fast tests, for while you work: a minute or so"
	@echo "make test    style, types and all tests, as CI runs them"
	@echo "make compose a router and four workers in containers (needs Docker; docs/containers.md)"
	@echo "make clean   remove what the targets above have made"
	@echo "Set PYTHON to choose another Python: make run PYTHON=python3.12"

run: $(VENV)/ready-to-run
	@exec $(BIN)/baton serve $(ARGS)

check: $(VENV)/ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) --quiet -m 'not slow' --schedules=2000

test: $(VENV)/ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) --durations=20

# What containers are made from; see deploy/docker/Dockerfile.
IMAGE ?= baton
BASE_IMAGE ?= python:3.12-slim-bookworm
PIP_ARGS ?=
COMPOSE := $(shell command -v docker-compose || echo docker compose)
COMPOSE_ENV := deploy/compose/.env

image:
	docker build --file deploy/docker/Dockerfile --tag $(IMAGE) \
		--build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg PIP_ARGS="$(PIP_ARGS)" .

# The secret that the servers share, made once.
$(COMPOSE_ENV):
	@umask 077 && echo "BATON_CLUSTER_TOKEN=$$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')" > $@

compose: image $(COMPOSE_ENV)
	cd deploy/compose && BATON_IMAGE=$(IMAGE) $(COMPOSE) up --detach --scale prefill=2 --scale decode=2
	@echo "Baton is at http://127.0.0.1:8000 when it has started; make compose-down stops it"

compose-down: $(COMPOSE_ENV)
	cd deploy/compose && $(COMPOSE) down

test-compose: $(VENV)/ready-to-test image
	$(BIN)/python -m tests.compose.try_compose $(IMAGE)

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
