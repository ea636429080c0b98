.PHONY: help setup demo test test-all check reliability bench clean
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests that kill runs or replicas at short instants, or ask a server how fast it is, have both cores to
# themselves; all others go two at a time, those first that mostly wait for Ray to start.
ALONE := tests/security tests/bench/test_serving_bench.py \
	$(patsubst %,tests/chaos/test_%.py,lost_nodes run_faults serving_faults) \
	$(patsubst %,tests/pipelines/endpoints/test_%.py,speaker_demo speaker_endpoint generate_demo \
		generate_endpoint generate_models generate_prompts) \
	$(patsubst %,tests/pipelines/test_%.py,serve_deploy serve_foreground) \
	$(patsubst %,tests/cluster/test_%.py,ray_session reservations training_ray)
PAIRED := tests/end_to_end tests/notebooks tests
FAST := $(BIN)/python -m pytest --hypothesis-profile=fixed -m "not slow"
# The embedded demo and the tests never talk to a hub, nor to anybody's telemetry.
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
# pip compiles nothing here: an environment that forbids Python to keep what it compiles, as container
# images often do, would have every process compile torch and Ray again (three times as slow).
unexport PYTHONDONTWRITEBYTECODE

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@# Modules are compiled when they are imported; most of them never are.
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(STAMP) ## make the environment .venv and install everything

demo: $(STAMP) ## run the speaker pipeline on the embedded corpus
	$(BIN)/goldcrest run speaker --config configs/speaker/tiny.yaml --store build/store --json build/demo.json

check: $(STAMP) ## format, lint, types, import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check ## all checks and tests (fast forms)
	$(FAST) -n 2 --dist loadfile --no-loadscope-reorder $(PAIRED) $(addprefix --ignore=,$(ALONE))
	$(FAST) $(ALONE)

test-all: check ## everything, long forms too
	$(BIN)/python -m pytest

reliability: $(STAMP) ## try to break runs (long) and write the table of docs/reliability.md
	GOLDCREST_RELIABILITY=docs/reliability.json $(BIN)/python -m pytest -m scenario tests/chaos tests/security tests/cluster

bench: $(STAMP) ## measure speed and memory against named peers
	$(BIN)/python -m pytest tests/bench -s

clean: ## remove build products (not the environment)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
