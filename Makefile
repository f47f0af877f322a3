# Each target does all the set-up it needs on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

TARGETS := demo test check bench clean test-pg15 comparison upstream chaos differential
.PHONY: $(TARGETS)

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

# two at a time, since most of them wait for servers; then, one at a time, those that have the whole
# machine under load, or a broker of files. What fails is run once more by itself, and must pass then:
# the servers of one test may keep those of another from being on time.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadfile
APART := tests/chaos tests/web/test_celery.py
TOGETHER := $(addprefix --ignore=,$(APART))
AGAIN := --last-failed --last-failed-no-failures=none
test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) $(TOGETHER) || $(BIN)/python -m pytest $(AGAIN) $(TOGETHER)
	$(BIN)/python -m pytest $(APART) || $(BIN)/python -m pytest $(AGAIN) $(APART)

# the tests that ask of servers what differs between versions, on another PostgreSQL:
# make test-pg15 PG15=/path/to/bin. test_stale_writes by itself: after all the others its replica on
# 15 once stayed behind for good, which was not explained yet.
PG15 ?= /usr/lib/postgresql/15/bin
STALE := tests/integration/test_stale_writes.py
ON_15 := $(addprefix tests/integration/test_,$(addsuffix .py,announced_nodes classification commit \
  consistency coordinator crash_sweep deadlines drivers_on_servers failover failover_tokens fencing \
  hashing_on_postgres hold keys_on_servers monitor promotion rejoin replicas run scatter schema \
  sessions sessions_async streams tpch transactions wire)) tests/differential/test_clauses_against_postgres.py \
  tests/differential/test_sessions_against_one_server.py tests/differential/test_known_silent_errors.py
test-pg15: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) --sqlroute-pg-bin=$(PG15) $(ON_15) || \
	  $(BIN)/python -m pytest $(AGAIN) --sqlroute-pg-bin=$(PG15) $(ON_15)
	$(BIN)/python -m pytest --sqlroute-pg-bin=$(PG15) $(STALE)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py

# all figures, or those that are named: make bench promotion, the same as make bench-promotion
NAMED := $(if $(filter bench,$(MAKECMDGOALS)),$(filter-out $(TARGETS),$(MAKECMDGOALS)))
bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks $(NAMED) $(BENCH)

bench-%: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks $* $(BENCH)

ifneq ($(NAMED),)
.PHONY: $(NAMED)
$(NAMED): ;@:
endif

# a million reads under tokens and 100,000 writes read back, over replicas held behind at random;
# then promotions: 100 in a row with clients that do all they may to write elsewhere, and under faults
chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos token_reads
	$(BIN)/python -m tests.chaos own_writes
	$(BIN)/python -m tests.chaos requests
	$(BIN)/python -m tests.chaos switchovers --fence L3 --count 100
	$(BIN)/python -m tests.chaos switchovers --fence L4 --count 20
	$(BIN)/python -m tests.chaos storm
	$(BIN)/python -m tests.chaos full_disk

# random queries on 1 to 4 shards against one PostgreSQL; QUERIES="5000 --seed 7" for others
QUERIES ?= 20000
differential: $(VENV)/.installed
	$(BIN)/python -m tests.differential $(QUERIES)

# docs/comparison.md, by running; in an environment of its own, with the peer that is compared
COMPARISON := build/comparison
PEER := advanced-alchemy==1.12.0
comparison: $(VENV)/.installed
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(COMPARISON) && \
	  uv pip install --quiet --python $(COMPARISON)/bin/python -e '.[local,parse]' '$(PEER)'; \
	else \
	  $(PYTHON) -m venv $(COMPARISON) && \
	  $(COMPARISON)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[local,parse]' '$(PEER)'; \
	fi
	$(COMPARISON)/bin/python -m tests.pitfalls

# SQLAlchemy's own test suite with RoutingSession in place of Session; UPSTREAM=--short for a part
upstream: $(VENV)/.installed
	$(BIN)/python -m tests.upstream $(UPSTREAM)

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
