# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint format gpu clean

demo: $(STAMP)
	$(BIN)/python -m latentrt.benchmarks.demo --output demo

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .ruff_cache .mypy_cache

# A CPU build of PyTorch is enough for everything here; constraints.txt names the tested version.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "latentrt needs Python 3.10 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[cpu,export,rtx,bench,dev]' -c constraints.txt
	mkdir -p $(VENV)/typing/latentrt
	for folder in benchmarks engines export runtime; do ln -sfn ../../../$$folder $(VENV)/typing/latentrt/$$folder; done
	touch $@
