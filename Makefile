# Each line is a command that a person could type. Every target makes .venv if it is missing;
# that takes python3 and pip and nothing else.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test clients lint bench bench-quick install openapi lock clean

serve: .venv/runtime
	$(BIN)/arbiter

install: .venv/dev

# The tests of one file stay in one process. PYTEST_OPTIONS="--numprocesses 0" runs them all in one.
test: .venv/dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(PYTEST_OPTIONS)

# Linters of the OpenAPI document, and clients that are generated from it. Also part of test.
clients: .venv/dev
	$(BIN)/python -m pytest tests/clients $(PYTEST_OPTIONS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# After a change of routes, models or problems.
openapi: .venv/runtime
	$(BIN)/arbiter openapi > openapi.json.new
	mv openapi.json.new openapi.json

# On a quiet machine; wrk makes better load than the bundled client (apt-get install wrk).
bench: .venv/dev
	$(BIN)/python -m bench

bench-quick: .venv/dev
	$(BIN)/python -m bench --quick

# After a change of the dependencies in pyproject.toml, with Python 3.11. Existing pins stay.
lock: .venv/dev
	$(COMPILE) --all-build-deps --only-build-deps --output-file requirements-build.lock pyproject.toml
	$(COMPILE) --output-file requirements.lock pyproject.toml
	$(COMPILE) --extra opentelemetry --constraint requirements.lock --output-file requirements-opentelemetry.lock pyproject.toml
	$(COMPILE) --extra dev --all-build-deps --constraint requirements-build.lock --constraint requirements-opentelemetry.lock --output-file requirements-dev.lock pyproject.toml

	$(COMPILE) --output-file tests/clients/requirements.lock tests/clients/requirements.in
	cd tests/clients && npm install --package-lock-only

COMPILE := CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The project itself is installed last, as a link to this folder: that makes .venv/bin/arbiter.
.venv/runtime: requirements.lock requirements-build.lock pyproject.toml | .venv/bin/python
	$(PIP) --require-hashes --requirement requirements.lock --requirement requirements-build.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

.venv/dev: requirements-dev.lock pyproject.toml | .venv/bin/python
	$(PIP) --require-hashes --requirement requirements-dev.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@ .venv/runtime
