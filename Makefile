# `make demo` and `make test` do everything on a machine with Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal
# The many processes that tests start read compiled modules instead of compiling them again.
export PYTHONDONTWRITEBYTECODE :=
# What a change of forms, decompositions, linear and convolutional layers, surgery or the scheduler
# can break, as far as a minute goes.
CORE := tests/test_forms.py tests/test_covering.py tests/test_laws.py tests/test_layout.py \
        tests/decompositions tests/layers/test_execution.py tests/layers/test_running.py \
        tests/surgery tests/scheduler \
        $(addprefix src/dynarank/,forms.py decompositions layers surgery scheduler)

# In processes of their own: what other packages leave in memory slows down every change of form.
HOSTS := $(foreach folder,integrations export,tests/$(folder) src/dynarank/$(folder))

.PHONY: demo test test-core test-laws-full test-faults check docs clean

demo: .venv/.demo  ## full rank, fixed low rank and decay on three seeds, in a new folder
	$(BIN)/dynarank compare shifted-digits --schedules full-rank,low-rank,decay --seeds 3 \
	    --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: .venv/.dev  ## all tests, one thread per process
	$(PYTEST) $(addprefix --ignore=,$(HOSTS))
	$(PYTEST) $(HOSTS)

test-core: .venv/.dev  ## the core without its slow tests, in under a minute
	$(PYTEST) -m "not slow" $(CORE)

test-laws-full: .venv/.dev  ## each law over its whole product, not only a covering set
	$(PYTEST) --all-laws -m product tests

FAULTS := tests/checkpoint tests/files \
	tests/train/test_resume_run.py tests/cli/test_resume.py tests/surgery/test_interrupted.py \
	tests/distributed/test_restart.py

test-faults: .venv/.dev  ## kills, flips, full disks, mutated files, interrupts: all of docs/checkpoints.md
	DYNARANK_FAULTS=full $(PYTEST) --timeout=3600 $(FAULTS)

check: .venv/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/.dev  ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints-dev.txt | .venv/bin/python
	$(INSTALL) -e '.[demo]'
	touch $@

.venv/.dev: pyproject.toml constraints-dev.txt | .venv/bin/python
	$(INSTALL) -e '.[dev]'
	touch $@ .venv/.demo
