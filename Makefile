# The four commands: make test, make lint, make demo, make bench. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
NATIVE := $(wildcard ext/*.pyx ext/*.pxd ext/*.c ext/*.h) setup.py pyproject.toml

.PHONY: test lint demo bench bench-peers clean tools

tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "make: CPython 3.11 or newer is needed as '$(PYTHON)' (set PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: the venv module is missing (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "make: the headers of CPython are missing (Debian: apt-get install python3-dev)" >&2; exit 1; }
	@command -v $${CC:-cc} >/dev/null || { echo "make: a C compiler is missing (Debian: apt-get install gcc)" >&2; exit 1; }

$(BIN)/python: | tools
	@$(PYTHON) -m venv $(VENV)

# One stamp per set of extras, made anew when a native source or the dependencies change.
$(VENV)/installed-%: $(NATIVE) | $(BIN)/python
	@echo "installing penstock[$*] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

test: $(VENV)/installed-test
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed-lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

demo: $(VENV)/installed-demo
	@$(BIN)/penstock demo $(ARGS)

bench: $(VENV)/installed-bench
	@$(BIN)/python bench/run.py $(ARGS)

bench-peers: $(VENV)/installed-bench
	@$(BIN)/python bench/peers/run.py $(ARGS)

clean:
	rm -rf build $(VENV) ext/*.so engine/*.egg-info
