# make help says what there is. PYTHON chooses the interpreter, VENV the environment's folder.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Options of `accelerate launch` itself, for example
#   make train LAUNCH="--config_file configs/accelerate/cpu_2_processes.yml"
LAUNCH ?= --config_file configs/accelerate/one_process.yml
# Worker processes of the tests.
TEST_WORKERS ?= 2

READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format clean

help: ## Say what there is
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  make train ARGS="optim.lr=1e-3"    passes anything on to train.py'

setup: $(READY) ## Make .venv and install everything into it

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gemtune needs Python 3.11 or newer; found: $$($(PYTHON) --version 2>&1)."; \
		  echo "Name another one: make setup PYTHON=python3.12"; exit 1; }
	@echo "making $(VENV) and installing gemtune with what it needs (once; takes some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --editable '.[dev,trackio]'
	@touch $(READY)

train: $(READY) ## Train: accelerate launch train.py recipe=gemma4_sft $(ARGS)
	@# Ctrl-C is for train.py, which saves first; the launcher would leave it behind.
	@# Given many processes, it would also kill them 30 s after it: too soon for a large save.
	@trap '' INT; export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}; \
		exec $(VENV)/bin/accelerate launch --quiet $(LAUNCH) train.py recipe=gemma4_sft $(ARGS)

test: $(READY) ## Run the tests (no network, no GPU)
	$(VENV)/bin/python -m pytest --numprocesses $(TEST_WORKERS) $(ARGS)

lint: $(READY) ## Check style, imports between packages, and file lengths
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python scripts/check_lengths.py

format: $(READY) ## Put the code into the style that lint checks
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Delete the environment and caches; runs/ stays
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
