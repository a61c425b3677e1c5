# make help says what there is. PYTHON chooses the interpreter, VENV the environment's folder.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Options of `accelerate launch` itself, for example
#   make train LAUNCH="--config_file configs/accelerate/cpu_2_processes.yml"
LAUNCH ?= --config_file configs/accelerate/one_process.yml
# Worker processes of the tests.
TEST_WORKERS ?= 2

# Kills of `make soak`; the tests make do with 25.
KILLS ?= 100

# The transformers releases of `make test-matrix`, what they are tested with, and which tests.
MATRIX ?= 5.5.4 5.9.0 5.17.0 5.23.0
MATRIX_PACKAGES := 'torch>=2.11,<2.14' accelerate datasets peft pillow jinja2 'pytest<9.2' pytest-xdist
MATRIX_TESTS := tests/contracts tests/unit/attention tests/unit/patches tests/unit/losses tests/trainers

READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train test test-matrix soak bench bench-gpu lint format clean

help: ## Say what there is
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  make train ARGS="optim.lr=1e-3"    passes anything on to train.py'

setup: $(READY) ## Make .venv and install everything into it

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gemtune needs Python 3.11 or newer; found: $$($(PYTHON) --version 2>&1)."; \
		  echo "Name another one: make setup PYTHON=python3.12"; exit 1; }
	@echo "making $(VENV) and installing gemtune with what it needs (once; takes some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --editable '.[dev,trackio,dashboard]'
	@touch $(READY)

train: $(READY) ## Train: accelerate launch train.py recipe=gemma4_sft $(ARGS)
	@# Ctrl-C is for train.py, which saves first; the launcher would leave it behind.
	@# Given many processes, it would also kill them 30 s after it: too soon for a large save.
	@trap '' INT; export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}; \
		exec $(VENV)/bin/accelerate launch --quiet $(LAUNCH) train.py recipe=gemma4_sft $(ARGS)

test: $(READY) ## Run the tests (no network, no GPU)
	$(VENV)/bin/python -m pytest --numprocesses $(TEST_WORKERS) $(ARGS)

test-matrix: $(MATRIX:%=test-transformers-%) ## Run the patch tests on the transformers releases in MATRIX

test-transformers-%: .matrix/%/.ready
	.matrix/$*/bin/python -m pytest --numprocesses $(TEST_WORKERS) $(MATRIX_TESTS) $(ARGS)

# Writes benchmarks/results/soak.json, which RELIABILITY.md is made from.
soak: $(READY) ## Kill runs at random moments, 100 times or KILLS=n, and compare every bit
	GEMTUNE_KILLS=$(KILLS) GEMTUNE_KILLS_OUTPUT=$(CURDIR)/benchmarks/results/soak.json \
		$(VENV)/bin/python -m pytest tests/faults/test_kills.py $(ARGS)

.PRECIOUS: .matrix/%/.ready
.matrix/%/.ready: pyproject.toml
	@echo "making .matrix/$* with transformers $* (once; takes some minutes)"
	@$(PYTHON) -m venv .matrix/$*
	@.matrix/$*/bin/python -m pip install --quiet 'transformers==$*' $(MATRIX_PACKAGES)
	@.matrix/$*/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

bench: $(READY) ## Measure what each patch saves and costs, and whether peaks have risen, on the CPU
	$(VENV)/bin/python benchmarks/memory_plan.py --gate
	$(VENV)/bin/python scripts/benchmark.py suite=patches size=e2b_small device=cpu \
		training=lora $(ARGS)

# From the repository alone, with the torch, transformers, accelerate and peft of PYTHON; results go
# to the folder OUT, or where they are committed. TRL takes part where it is installed, or lies as
# wheels in the folder WHEELS. Ends within 9 minutes, the most important first: each writes after each
# case, and leaves out what does not fit or is cut off (Error 124).
bench-gpu: ## Measure on a GPU, at the whole shapes of E2B and E4B, in under 9 minutes
	-PYTHONPATH=src timeout 280 $(PYTHON) benchmarks/real_sizes.py --device cuda \
		--dtype bfloat16 --limit-seconds 270 $(if $(WHEELS),--wheels $(WHEELS)) \
		--output $(or $(OUT),$(CURDIR)/benchmarks/results)/real_sizes_cuda
	-PYTHONPATH=src timeout 95 $(PYTHON) benchmarks/memory_plan.py --device cuda \
		--limit-seconds 90 \
		--output $(or $(OUT),$(CURDIR)/benchmarks/results)/memory_plan_cuda
	-PYTHONPATH=src timeout 40 $(PYTHON) benchmarks/supervised_positions.py --device cuda \
		--size e2b --dtype bfloat16 --training lora --rows 4 --text-tokens 2048 \
		--output $(or $(OUT),$(CURDIR)/benchmarks/results)/supervised_positions_cuda
	-PYTHONPATH=src timeout 40 $(PYTHON) benchmarks/linear_cross_entropy.py --device cuda \
		--dtype bfloat16 --rows 8192 --hidden 1536 --vocabulary 262144 --repetitions 5 \
		--ignored 0 50 80 --output $(or $(OUT),$(CURDIR)/benchmarks/results)/linear_cross_entropy_cuda
	PYTHONPATH=src $(PYTHON) scripts/benchmark.py suite=patches size=e2b device=cuda \
		training=lora repetitions=2 limit_seconds=60 $(ARGS)

lint: $(READY) ## Check style, imports between packages, and file lengths
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python scripts/check_lengths.py

format: $(READY) ## Put the code into the style that lint checks
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Delete the environment and caches; runs/ stays
	rm -rf $(VENV) .matrix build dist src/*.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
