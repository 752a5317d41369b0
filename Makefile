# Every target makes its own environment in .venv; nothing else has to be done before.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: install demo test lint types bench figures compatibility clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/backdrift demo --out runs/demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Two files at a time, on a core each: the tests' tensors are too small for more threads to help.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Measures for a quarter of an hour and more; wants a machine that does nothing else.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.exact_gradient $(ARGS)

figures: $(STAMP)
	$(BIN)/python -m benchmarks.figures --write

compatibility: $(STAMP)
	$(BIN)/python tests/compat/page.py --write

# The tables of docs/solvers.md.
orders: $(STAMP)
	$(BIN)/python tests/solver_table.py --write

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
