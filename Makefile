# Everything that a newcomer needs: `make demo` and `make test`. Both make .venv first if it is not there.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-all lint types clean

help:
	@echo "make demo      the whole road on a phantom cohort, on a CPU, in minutes"
	@echo "make test      the tests"
	@echo "make test-all  the slow ones too"
	@echo "make lint      ruff;  make types  mypy"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "BrainFound needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/brainfound demo --out demo --overwrite

# Two processes with one thread each; more with `pytest -n` on a larger machine.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"
	$(BIN)/python -m pytest -q -m slow

lint:
	ruff check . && ruff format --check .

types: $(INSTALLED)
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
