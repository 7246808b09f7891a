# Everything a fresh machine needs besides Python and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help install fit test format lint type mutants credit benchmark clean

help:  ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(VENV)/.installed: setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed  ## Make .venv and install the package in it

fit: install  ## Train the embedded default; ARGS="--option value" is passed on
	$(BIN)/python -m lightning_grpo fit $(ARGS)

test: install  ## Run linters, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

format: install  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: install  ## Run the linters
	$(BIN)/ruff check .

type: install  ## Check the types
	$(BIN)/mypy

mutants: install  ## Break the mathematics in many small ways; every mutant has to be caught
	$(BIN)/python tests/mutants.py

credit: install  ## Compare credit per token with one advantage per completion; 15 minutes
	$(BIN)/python tests/token_credit.py

benchmark: install  ## Time the training step against TRL's on this CPU; needs 16 GB and a quiet hour
	$(BIN)/python -m lightning_grpo benchmark --preset cpu --output tests/results $(ARGS)

clean:  ## Remove what was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
