# Every target builds .venv itself when it is missing or older than its inputs.
# Needed beforehand: make and Python 3.11 or newer. uv is used when it is on PATH.

PYTHON ?= python3
PYTEST_ARGS ?=
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt
CODE := $(wildcard src tests tools recipes lab benchmarks experiments)
UV := $(shell command -v uv 2>/dev/null)

ifeq ($(UV),)
CREATE = $(PYTHON) -m venv $(VENV)
INSTALL = $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check
else
CREATE = uv venv -q --seed --allow-existing --python $(PYTHON) $(VENV)
INSTALL = uv pip install -q --python $(BIN)/python
endif

# Two test workers, one thread each: more threads than cores make small matrices slower.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check fmt clean

help:
	@echo "make demo    decode with the bundled checkpoint, beside plain autoregressive decoding"
	@echo "make test    run the tests          (PYTEST_ARGS='-k layout' narrows them)"
	@echo "make check   formatting, lint, types, layers, sizes"
	@echo "make fmt     format, and fix what lint can fix"
	@echo "make clean   remove .venv, caches and build output"
	@echo
	@echo "Each builds .venv when needed. Another interpreter: make test PYTHON=python3.12"

demo: $(VENV)/.demo
	@$(BIN)/python -m tidar demo

test: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 $(ONE_THREAD) $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy $(wildcard src tools recipes lab)
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/size.py

fmt: $(VENV)/.dev
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf $(VENV) build dist src/*.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: tidar needs Python 3.11 or newer, and '$(PYTHON)' is not one." >&2; \
	  echo "       Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(CREATE)
	@touch $@

# The core alone, so that a first `make demo` is quick.
$(VENV)/.demo: $(INPUTS) | $(VENV)/.created
	@echo "Installing tidar and its dependencies into $(VENV) (the first time, PyTorch is most of it) ..."
	@$(INSTALL) -c constraints.txt -e .
	@touch $@

# Everything; it contains the core, so both stamps are renewed.
$(VENV)/.dev: $(INPUTS) | $(VENV)/.created
	@echo "Installing tidar and its development tools into $(VENV) (the first time, PyTorch is most of it) ..."
	@$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.demo $@
