# The project's commands. Each sets up what it needs first; `make setup` asks for Python 3.11, a compiler and a package index only.

VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
UV := $(BIN)/uv
UV_VERSION := 0.13.9
STAMP := $(VENV)/.setup-done
NODE := tests/e2e/node

# What `make bench` runs (`profile-service bench --help` lists them), and what is passed on: make bench BENCH=ingest ARGS=--json
BENCH ?= ingest
ARGS ?=
# Two workers; the tests that share a service stay on one of them (tests/conftest.py). In the order of the files, so that the longest of
# them are not left for the end, when the other worker has nothing to do.
PYTEST_FLAGS ?= -n 2 --dist loadgroup --no-loadscope-reorder --durations 15

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

export UV_PROJECT_ENVIRONMENT := $(CURDIR)/$(VENV)
export UV_PYTHON_DOWNLOADS := never
# Trust what the machine trusts: behind a proxy that signs anew, uv's and Node's own lists of authorities refuse every package index.
export UV_SYSTEM_CERTS := true
NODE_EXTRA_CA_CERTS ?= $(firstword $(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt))
export NODE_EXTRA_CA_CERTS
# A Ray process that may not keep what it compiled takes three times as long to start.
unexport PYTHONDONTWRITEBYTECODE
unexport PYTHONPATH
unexport VIRTUAL_ENV

.PHONY: help
help:  ## This list
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- setting up ---

.PHONY: setup
setup: $(STAMP)  ## Make .venv with everything, as uv.lock says

$(UV): scripts/make_venv.sh Makefile
	scripts/make_venv.sh $(VENV) $(UV_VERSION)

$(STAMP): $(UV) pyproject.toml clients/python/pyproject.toml uv.lock
	@echo "Installing what uv.lock names into $(VENV)"
	$(UV) sync --quiet --frozen --all-packages --all-groups --all-extras --compile-bytecode
	touch $@

.PHONY: test-tools
test-tools: $(STAMP) bench-tools $(if $(wildcard $(NODE)/package-lock.json),$(NODE)/node_modules/.package-lock.json)

$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json scripts/install_tools.sh
	scripts/install_tools.sh node=nodejs npm=npm
	npm ci --prefix $(NODE) --ignore-scripts --no-audit --no-fund
	touch $@

.PHONY: host-tools
host-tools: $(STAMP)
	scripts/install_tools.sh ip=iproute2 rsync=rsync ssh=openssh-client /usr/sbin/sshd=openssh-server

.PHONY: bench-tools
bench-tools: $(STAMP)
	scripts/install_tools.sh redis-server=redis-server

KERNELS := $(shell grep -rlE '^@.*(kernel|njit)|^from numba|^import numba' --include='*.py' profile_service)

$(VENV)/.kernels-done: $(STAMP) $(KERNELS) scripts/compile_kernels.py
	$(PYTHON) scripts/compile_kernels.py
	touch $@

# --- running ---

.PHONY: demo
demo: $(STAMP)  ## Start the service, replay the sample, print a profile, keep serving
	$(BIN)/profile-service demo $(ARGS)

.PHONY: bench
bench: $(VENV)/.kernels-done  ## Run a benchmark: BENCH=ingest ARGS=...
	$(BIN)/profile-service bench $(BENCH) $(ARGS)

.PHONY: bench-all
bench-all: bench-tools $(VENV)/.kernels-done  ## Run every benchmark, draw into docs/, and print the table of docs/performance.md
	$(PYTHON) scripts/bench_all.py $(ARGS)

.PHONY: bench-libraries
bench-libraries: $(STAMP)  ## Measure grpcio, threads and event loops against what was chosen of them
	$(PYTHON) scripts/bench_libraries.py $(ARGS)

# --- testing and checking ---

.PHONY: test
test: test-tools $(VENV)/.kernels-done  ## Run the tests, but for test-long: ARGS='-k name --seed 7'
	$(PYTHON) -m pytest $(PYTEST_FLAGS) -m "not long" $(ARGS)

.PHONY: test-long
test-long: test-tools host-tools $(VENV)/.kernels-done  ## Run what takes longer: ray up on hosts of its own, long tests with Redis, the longer benchmarks
	$(PYTHON) -m pytest $(PYTEST_FLAGS) -m long $(ARGS)

.PHONY: check
check: check-format check-lint check-types check-layers check-protos check-generated check-lock  ## Format, lint, types, layers, protos, fresh generated code and lock

.PHONY: check-format check-lint check-types check-layers check-protos check-generated check-lock
check-format: $(STAMP)
	$(BIN)/ruff format --check

check-lint: $(STAMP)
	$(BIN)/ruff check

check-types: $(STAMP)
	$(BIN)/mypy

check-layers: $(STAMP)
	$(BIN)/lint-imports

check-protos: $(STAMP)
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/buf build --path protos/userprofile/v1 --output -\#format=binpb \
	    | $(BIN)/buf breaking -\#format=binpb --against protos/baseline.binpb --exclude-imports

check-generated: $(STAMP)
	scripts/generate_protos.sh --check
	$(PYTHON) scripts/generate_sync_client.py --check

check-lock: $(STAMP)
	$(UV) lock --quiet --check

.PHONY: fix
fix: $(STAMP)  ## Format, and mend what can be mended by itself
	$(BIN)/ruff check --fix-only --exit-zero
	$(BIN)/ruff format
	$(BIN)/buf format --write protos

# --- generating ---

.PHONY: protos
protos: $(STAMP)  ## Generate code and descriptors from protos/
	scripts/generate_protos.sh
	$(PYTHON) scripts/generate_sync_client.py

.PHONY: baseline
baseline: $(STAMP)  ## Take the public protos of now as what must not break from here on
	$(BIN)/buf build --path protos/userprofile/v1 --exclude-source-info --output protos/baseline.binpb

.PHONY: lock
lock: $(STAMP)  ## Take the newest versions that pyproject.toml allows
	$(UV) lock --upgrade

.PHONY: clean
clean:  ## Remove what was built and what was cached, .venv and all
	rm -rf $(VENV) $(NODE)/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
