# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test slow lint format bench bench-tune forgetting tuners tables clean
.DEFAULT_GOAL := help

# Without bytecode each of the many processes of the tests would compile all of ktmerge, and pytest all tests.
unexport PYTHONDONTWRITEBYTECODE

help: ## say what each target does
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The versions are pinned in constraints.txt; what they are for stands in pyproject.toml.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test,dev]'
	@touch $@

demo: $(INSTALLED) ## the whole job on a small real model; leaves ktmerge-demo/report.html
	$(BIN)/ktmerge demo --out ktmerge-demo

test: $(INSTALLED) ## the unit tests
	$(BIN)/python -m pytest

slow: $(INSTALLED) ## the tests that take longer
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## speed and memory, side by side with mergekit
	$(BIN)/python benchmarks/bench_blend.py

bench-tune: $(INSTALLED) ## speed, memory and losses of fine-tuning, side by side with TRL
	$(BIN)/python benchmarks/bench_tune.py --runs 3

forgetting: $(INSTALLED) ## what every method keeps and gains in two small worlds; writes docs/results.md
	$(BIN)/python benchmarks/forgetting.py

tuners: $(INSTALLED) ## what every way to tune keeps and gains in the same worlds; writes docs/tuners.md
	$(BIN)/python benchmarks/tuners.py

tables: $(INSTALLED) ## write the tables of docs/methods.md and the JSON Schemas from the registry
	$(BIN)/python -m ktmerge.merge.catalogue docs/methods.md
	$(BIN)/python -m ktmerge.merge.schema

clean: ## remove what the targets above made
	rm -rf $(VENV) ktmerge-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
