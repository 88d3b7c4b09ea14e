PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := setup.py pyproject.toml $(wildcard speechrnt/*.pyx speechrnt/*.pxd speechrnt/*.h)
export SPEECHRNT_WERROR = 1

.PHONY: build demo test lint bench wheel clean

build: $(VENV)/.built

demo: build
	$(BIN)/python examples/transcribe_samples.py

test: lint
	$(BIN)/python -m pytest

lint: build $(VENV)/.test
	$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/cython-lint speechrnt && $(BIN)/mypy && $(BIN)/python -m mypy.stubtest $(STUBBED)
