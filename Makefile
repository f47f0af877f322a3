# Each target does all the set-up it needs on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean test-pg15

# a virtual environment with everything for development; made again when pyproject.toml changes
$(VENV)/.installed: pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
	  uv pip install --quiet --python $(BIN)/python -e '.[dev]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'; \
	fi
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/sqlroute demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# the tests that need servers, on another PostgreSQL: make test-pg15 PG15=/path/to/bin
PG15 ?= /usr/lib/postgresql/15/bin
test-pg15: $(VENV)/.installed
	$(BIN)/python -m pytest -m servers --sqlroute-pg-bin=$(PG15)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py

bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
