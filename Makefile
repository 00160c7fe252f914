# Outrider: what a developer types. Everything lives in .venv; nothing here needs more than Debian, Python 3.11 and make.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := edge,otel,vision,industrial,sim,hub,models,tensorrt,dev
export OUTRIDER_CACHE ?= $(CURDIR)/.cache
export ORT_DISABLE_TELEMETRY := 1

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.venv/.ready: pyproject.toml constraints.txt
	@deploy/make-venv.sh "$(PYTHON)" .venv
	@echo "installing Python packages (a minute or two)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

models: .venv/.ready
	@for model in smollm2 ppocr-det ppocr-rec silero-vad efficientnet-lite0; do $(BIN)/outrider models fetch $$model >/dev/null || exit; done

setup: models system ## everything demo and test need: Python packages, model files, and (as root) Debian's brokers and browser
	@echo "ready: make demo, make test"

system: ## Debian packages that some tests use (Mosquitto, PostgreSQL, Chromium), where they can be installed
	@deploy/system-packages.sh

demo: models ## a hub, three devices, ten tasks, a cut cable: the main job in four minutes
	@$(BIN)/outrider demo $(ARGS)

test: models system ## the test suite, but what takes over 20 seconds a test (make slow)
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'not faults and not slow' $(ARGS)

slow: models system ## the long tests: language models end to end, every recipe, daemons and brokers for minutes
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'slow and not faults' $(ARGS)

faults: models system ## the fault matrix against real processes: prints it and writes docs/reliability.md (minutes)
	@$(BIN)/python -m tests.faults --docs docs/reliability.md $(ARGS)

check: .venv/.ready ## format, lint, types, import rules
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

bench: models system ## the benchmarks, with their peers (builds llama-cpp-python from source at the first run)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS),bench]'
	@$(BIN)/outrider bench llm
	@$(BIN)/outrider bench toolcall
	@$(BIN)/outrider bench uplink
	@$(BIN)/outrider bench offline

conformance: .venv/.ready ## the device's TUF client against the public suite in TUF_CONFORMANCE_DIR
	@if [ -d "$(TUF_CONFORMANCE_DIR)/tuf_conformance" ]; then \
	  cd "$(TUF_CONFORMANCE_DIR)" && $(CURDIR)/$(BIN)/python -m pytest -q -p no:cacheprovider tuf_conformance \
	    -o asyncio_default_fixture_loop_scope=function \
	    --entrypoint "$(CURDIR)/$(BIN)/outrider trust conformance-client"; \
	else echo "tuf-conformance: NOT RUN: set TUF_CONFORMANCE_DIR to a copy of theupdateframework/tuf-conformance"; fi

clean: ## what was built, but not the model files
	rm -rf .venv .demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info demo-report.json

.PHONY: help setup system demo test slow faults check bench conformance models clean
