# The four commands: make test, make lint, make demo, make bench. Each makes .venv and installs what it needs; none needs
# another first. ARGS are passed on: make demo ARGS=--no-serve, make test ARGS=tests/ext, make bench ARGS='--only trees'.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
SECONDS ?= 1800
NATIVE := $(wildcard ext/*.pyx ext/*.pxd ext/*.c ext/*.h) setup.py pyproject.toml

.PHONY: test stress asan ci-extra lint demo bench bench-peers soak clean tools

tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "make: CPython 3.11 or newer is needed as '$(PYTHON)' (set PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: the venv module is missing (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "make: the headers of CPython are missing (Debian: apt-get install python3-dev)" >&2; exit 1; }
	@command -v $${CC:-cc} >/dev/null || { echo "make: a C compiler is missing (Debian: apt-get install gcc)" >&2; exit 1; }

$(BIN)/python: | tools
	@$(PYTHON) -m venv $(VENV)

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The extensions, built in place, anew when a native source changes.
$(VENV)/built: $(NATIVE) | $(BIN)/python
	@echo "building penstock into $(VENV)"
	@$(PIP) -e .
	@touch $@

# The package's requirements and those of one extra.
$(VENV)/extra-%: pyproject.toml .ci/requirements.py | $(BIN)/python
	@echo "installing what '$*' needs into $(VENV)"
	@$(BIN)/python .ci/requirements.py $* > $@.txt
	@$(PIP) -r $@.txt
	@touch $@

test: $(VENV)/built $(VENV)/extra-test
	@$(BIN)/python -m pytest $(ARGS)

# An hour of random apps against exact fractions and SQL: make stress ARGS='--minutes 10'; a failure prints its seed.
stress: $(VENV)/built $(VENV)/extra-test
	@$(BIN)/python tests/stress/run.py $(ARGS)

# The kernels under the address and undefined-behaviour sanitizers, in build/asan: their tests, and damaged files of every
# kind. make asan ARGS='--seed 7', or pytest's arguments: make asan ARGS=tests/ext/test_windows.py
asan: $(VENV)/built $(VENV)/extra-test
	@$(BIN)/python -c 'import Cython, setuptools' 2>/dev/null || $(PIP) 'setuptools>=77' 'cython>=3.1'
	@$(BIN)/python tests/sanitizers/run.py $(ARGS)

# What only CI installs beside the tests' own needs; tests that lack it skip.
ci-extra: $(VENV)/built $(VENV)/extra-test $(VENV)/extra-ci $(VENV)/kserve/installed

# KServe's client in an environment of its own: it holds pandas and psutil at versions older than ours.
$(VENV)/kserve/installed: | $(BIN)/python
	@echo "installing KServe's client into $(VENV)/kserve"
	@$(PYTHON) -m venv $(VENV)/kserve
	@$(VENV)/kserve/bin/python -m pip install --quiet --disable-pip-version-check kserve
	@touch $@

lint: $(VENV)/extra-lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

demo: $(VENV)/built $(VENV)/extra-demo
	@$(BIN)/penstock demo $(ARGS)

bench: $(VENV)/built $(VENV)/extra-bench
	@$(BIN)/python bench/run.py $(ARGS)

# Half an hour of load, and whether anything drifts: make soak SECONDS=300 for less.
soak: $(VENV)/built $(VENV)/extra-bench
	@$(BIN)/python bench/load/soak.py --seconds $(SECONDS) $(ARGS)

bench-peers: $(VENV)/built $(VENV)/extra-bench
	@$(BIN)/python bench/peers/run.py $(ARGS)

clean:
	rm -rf build $(VENV) ext/*.so engine/*.egg-info
