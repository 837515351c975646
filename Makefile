# Everything runs in a virtual environment of its own; a fresh machine needs Python >= 3.10 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# two processes; one that is done takes tests from the other
WORKERS ?= -n 2 --dist worksteal
# of each survey, every so many-th case
EVERY ?= 1
CHECKPOINT ?= $(firstword $(wildcard fixtures/dense-llama/checkpoint-*))

.PHONY: demo test test-long test-survey test-all lint docs clean

demo: $(VENV)/.installed  ## widen a bundled checkpoint and show the report
	rm -rf out/demo
	mkdir -p out
	$(BIN)/sparkling expand $(CHECKPOINT) out/demo --axis ffn --factor 2
	$(BIN)/sparkling verify $(CHECKPOINT) out/demo

test: $(VENV)/.installed-dev  ## lint, types and the default tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(WORKERS)

test-long: $(VENV)/.installed-dev  ## the long tests only
	$(BIN)/python -m pytest -q -m 'slow and not survey' $(WORKERS)

test-survey: $(VENV)/.installed-dev  ## every class of transformers, and a thousand damaged checkpoints
	$(BIN)/python -m pytest -q -m survey $(WORKERS) --every $(EVERY)

test-all: test test-long test-survey

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(VENV)/.installed-dev  ## the generated pages of the reference, and the site in out/site
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first: a version that is already there is not replaced by a larger build
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[hf]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache
