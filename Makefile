# make demo · make test · make bench · make lint · make docs
# Each target makes the virtual environment it needs; nothing has to be installed by hand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One BLAS thread a process, and no network: what the tests and the figures in the documentation were made with.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test lint bench bench-merge bench-extract docs
.DEFAULT_GOAL := test

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,train,plot]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m fixtures.demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py

bench-merge: $(STAMP)
	env -u OMP_NUM_THREADS $(BIN)/python benchmarks/merging.py

bench-extract: $(STAMP)
	env -u OMP_NUM_THREADS $(BIN)/python benchmarks/extracting.py

docs: $(STAMP)
	$(BIN)/python -m loratools.cli.reference docs
