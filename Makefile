# Every target makes its own environment in .venv; nothing else has to be done before.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: install demo test lint types oldest bench figures compatibility orders clean

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

# The same on the oldest versions that pyproject.toml allows, in an environment of its own (gigabytes: torch with CUDA).
# What diffusers had not yet then is left out: group offloading of pipelines, modular pipelines, some caches.
oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e ".[dev]"
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n 2 --dist loadfile tests/test_exact.py tests/test_memory.py \
		tests/test_sampling.py tests/test_differentiable.py tests/compat/test_targets.py tests/compat/test_schedulers.py

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
	rm -rf $(VENV) $(VENV)-oldest build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
