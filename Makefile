# Each line is a command that a person could type. Every target makes .venv when it is
# missing, with python3 and pip and nothing else.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test lint bench bench-quick install lock clean

serve: .venv/runtime
	$(BIN)/python -m app

install: .venv/dev

test: .venv/dev
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# On a quiet machine; wrk makes better load than the bundled client (apt-get install wrk).
bench: .venv/dev
	$(BIN)/python -m bench

bench-quick: .venv/dev
	$(BIN)/python -m bench --quick

# After a change of the dependencies in pyproject.toml.
lock: .venv/dev
	$(COMPILE) --output-file requirements.lock pyproject.toml
	$(COMPILE) --extra opentelemetry --constraint requirements.lock --output-file requirements-opentelemetry.lock pyproject.toml
	$(COMPILE) --extra dev --constraint requirements-opentelemetry.lock --output-file requirements-dev.lock pyproject.toml

COMPILE := CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/runtime: requirements.lock | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	touch $@

.venv/dev: requirements-dev.lock | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.lock
	touch $@ .venv/runtime
