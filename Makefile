# Everything a fresh machine needs: `make demo` draws and measures, `make test` checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs

.PHONY: help demo test long slow soak lint format docs gpu clean

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(STAMP)  ## set up, draw pictures with the embedded model, measure them beside diffusers
	$(BIN)/python -m latentrt.benchmarks.demo --output demo

test: lint  ## set up, lint, check types, run the suite
	$(BIN)/python -m pytest

long: $(STAMP)  ## run the tests that take many seconds each, as CI does
	$(BIN)/python -m pytest -m "long and not slow"

slow: $(STAMP)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

soak: $(STAMP)  ## run threads, failures and damage of every kind: a part of slow
	$(BIN)/python -m pytest -m slow tests/soak

lint: $(STAMP)  ## set up, lint and check types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS)  ## write the generated tables anew and build the site, strictly, into site/
	$(BIN)/python .ci/reference.py
	$(BIN)/zensical build --clean --strict

gpu: $(STAMP)  ## run the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

clean:  ## remove everything that these targets made
	rm -rf $(VENV) build dist demo site *.egg-info .cache .pytest_cache .ruff_cache .mypy_cache

# A CPU build of PyTorch is enough for everything here; constraints.txt names the tested versions.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "latentrt needs Python 3.10 or newer: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and the other packages of constraints.txt into $(VENV), once: a few minutes"
	@$(BIN)/python -m pip install --quiet torch -c constraints.txt
	@$(BIN)/python -m pip install --quiet -e '.[cpu,openvino,export,rtx,serve,bench,dev]' -c constraints.txt
	@mkdir -p $(VENV)/typing/latentrt
	@for folder in benchmarks engines export runtime; do ln -sfn ../../../$$folder $(VENV)/typing/latentrt/$$folder; done
	@touch $@

$(DOCS): $(STAMP)
	@echo "installing what builds the documentation into $(VENV)"
	@$(BIN)/python -m pip install --quiet -e '.[docs]' -c constraints.txt
	@touch $@
