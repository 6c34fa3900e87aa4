# Everything here works on a fresh machine that has Python 3.11 or newer and make.
#
#   make help               the targets
#   make test PYTHON=/usr/bin/python3.12
#   make test ARGS="-k mnist -x"

VENV := .venv
BIN  := $(VENV)/bin
ARGS ?=

# A stamp is written last: an installation cut short is done again. It names both files that decide
# what is installed, so that a change in either brings the environment up to date.
# INSTALLED: what running needs. READY: what working on Lockstep needs as well.
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
# JAX and TensorFlow, which `make bench` compares with: an environment of their own.
FRAMEWORKS := .venv-frameworks/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# torch's builds for CPUs: PyPI has the one for CUDA, of several gigabytes.
CPU_TORCH := https://download.pytorch.org/whl/cpu

# The first interpreter that is new enough. A version manager may offer a python3.11 that does
# not start, so each candidate is run.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

.DEFAULT_GOAL := help
.PHONY: help run test test-long native fuzz check format docs docs-tree docs-reference bench bench-recovery bench-checkpoints bench-records bench-stragglers bench-network bench-hosts bench-recipes bench-dashboard device-check chaos chaos-hosts clean

help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' \
		$(MAKEFILE_LIST)

run: $(INSTALLED) ## Train the MNIST CNN on two workers
	$(BIN)/lockstep data fetch mnist
	$(BIN)/lockstep run mnist --model cnn --workers 2 $(ARGS)

test: $(READY) native ## Run the tests, without the long ones
	$(BIN)/python -m pytest $(ARGS)

test-long: $(READY) native ## Run the long tests only
	$(BIN)/python -m pytest -m long $(ARGS)

native: $(INSTALLED) ## Build what runs without the interpreter; without a compiler, nothing
	@$(BIN)/lockstep build-native || echo "going on without it" >&2

fuzz: $(READY) ## Run each fuzz test with 3,000 inputs, and print how they ended
	$(BIN)/python -m pytest --fuzz 3000 $(ARGS)

check: $(READY) ## Check format, lint, types and the layers of packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(READY) ## Format, and fix what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-tree: $(READY) ## Write the file tree in docs/architecture.md anew
	$(BIN)/python -m tests.support.file_tree

docs-reference: $(READY) ## Write docs/reference.md anew, from the public docstrings
	$(BIN)/python -m tests.support.api_reference

docs: $(INSTALLED) ## Build the documentation as a site, in build/docs
	@$(PIP) install --quiet 'zensical>=0.0.40'
	$(BIN)/zensical build --config-file mkdocs.yml --strict

bench: $(READY) native $(FRAMEWORKS) ## Measure Lockstep against its alternatives (an hour, alone on the machine)
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-recovery: $(READY) ## Measure recovery from killed workers, compared with torchrun's restart
	$(BIN)/lockstep data fetch mnist
	$(BIN)/python -m benchmarks.recovery $(ARGS)

bench-checkpoints: $(READY) ## Measure what a checkpoint a second costs
	$(BIN)/python -m benchmarks.checkpoints $(ARGS)

bench-records: $(READY) ## Measure what the snapshot and the ledger cost
	$(BIN)/python -m benchmarks.records $(ARGS)

bench-stragglers: $(READY) ## Measure what a worker at a quarter of its speed costs
	$(BIN)/python -m benchmarks.stragglers $(ARGS)

bench-network: $(READY) ## Measure the network between hosts, on loopback
	$(BIN)/python -m benchmarks.network $(ARGS)

bench-hosts: $(READY) ## Measure two hosts (network namespaces; as root) compared with DDP, and a host's death
	$(BIN)/python -m benchmarks.hosts $(ARGS)
	$(BIN)/python -m benchmarks.host_recovery

bench-recipes: $(READY) ## Measure the recipes compared with DistributedDataParallel
	for name in fashion-mnist movielens-100k adult descriptions; do \
		$(BIN)/lockstep data fetch $$name || exit 1; done
	$(BIN)/python -m benchmarks.recipes $(ARGS)

bench-dashboard: $(READY) ## Measure what the events and the page cost
	$(BIN)/python -m benchmarks.dashboard $(ARGS)

device-check: $(INSTALLED) ## Check that a GPU keeps the promise; ARGS="--device cpu-apart" without one
	$(BIN)/python -m benchmarks.device_check $(ARGS)

chaos: $(READY) ## Disturb runs at random and compare them with undisturbed ones
	$(BIN)/python -m benchmarks.chaos $(ARGS)

chaos-hosts: $(READY) ## The same over four hosts, network namespaces, some of them harmful (needs root)
	$(BIN)/python -m benchmarks.chaos_hosts $(ARGS)

clean: ## Remove caches and build output (keeps .venv and runs)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "no Python 3.11 or newer found; install one, or run: make PYTHON=/path/to/python" >&2; \
		exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing torch and what Lockstep needs into $(VENV)" >&2
	@$(PIP) install --no-deps --retries 1 --timeout 20 --constraint constraints.txt \
		--extra-index-url $(CPU_TORCH) torch || echo "no CPU build to be had: any other then" >&2
	@$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(READY): $(INSTALLED)
	@echo "installing what tests and checks need into $(VENV)" >&2
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(FRAMEWORKS): benchmarks/frameworks/requirements.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -m venv .venv-frameworks
	@echo "installing JAX and TensorFlow into .venv-frameworks (2 GB)" >&2
	@.venv-frameworks/bin/python -m pip --disable-pip-version-check install --requirement $<
	@touch $@
