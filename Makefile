# `make demo` and `make test` do everything on a machine with Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt

.PHONY: demo test check clean

demo: .venv/.demo  ## train the embedded default under three schedules
	$(BIN)/dynarank train digits

test: .venv/.dev  ## all tests, one thread per process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

check: .venv/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints-dev.txt | .venv/bin/python
	$(INSTALL) -e '.[demo]'
	touch $@

.venv/.dev: pyproject.toml constraints-dev.txt | .venv/bin/python
	$(INSTALL) -e '.[dev]'
	touch $@ .venv/.demo
