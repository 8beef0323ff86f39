# Everything a newcomer runs. Needs git, make and Python 3.11; `make setup` brings the rest.

PYTHON ?= python3.11
SYSTEM_PACKAGES ?= install
# What `make up` and `make stop` drive: `embedded` (processes, needs no Docker) or `compose`
# (docker-compose.yaml). The first stays the default, so that two commands are enough for a start.
PLATFORM ?= embedded

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# vLLM imports thousands of modules: without byte code each of its starts takes 20-40 s longer.
unexport PYTHONDONTWRITEBYTECODE
# An environment that happens to be active is never the one that is meant.
unexport VIRTUAL_ENV
export UV_PYTHON_DOWNLOADS := never

UV := .venv-tools/bin/uv
RUN := .venv/bin

# vLLM for the CPU needs the CPU build of PyTorch. It comes from the folders named in
# PIP_FIND_LINKS if there are any, else from PyTorch's own index, which uv knows by name.
ifeq ($(strip $(PIP_FIND_LINKS)),)
TORCH_SOURCE := --torch-backend cpu
else
TORCH_SOURCE := $(foreach place,$(PIP_FIND_LINKS),--find-links $(place))
endif

# Those that are programs of their own; the others are pytest's.
BENCHMARKS := $(filter-out tests/benchmarks/test_% tests/benchmarks/conftest.py,$(wildcard tests/benchmarks/*.py tests/benchmarks/*/__main__.py))

# A stamp carries the digest of what it was made from, so a changed lock, on whichever branch,
# brings its environment up to date and an unchanged one costs nothing.
digest = $(shell cat $(1) 2>/dev/null | sha256sum | cut -c1-16)
TOOLS_STAMP := .venv-tools/.made-from-$(call digest,requirements/tools.txt)
AIRFLOW_LOCKED := .venv/.made-from-$(call digest,requirements/airflow.txt)
SERVE_LOCKED := .venv-serve/.made-from-$(call digest,requirements/serve.txt)
PROJECT := $(call digest,pyproject.toml)
AIRFLOW_STAMP := .venv/.project-$(PROJECT)
SERVE_STAMP := .venv-serve/.project-$(PROJECT)

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+( [a-z-]+)*:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: system-packages $(AIRFLOW_STAMP) $(SERVE_STAMP) ## Install everything: system packages, .venv (Airflow), .venv-serve (vLLM)

.PHONY: demo
demo: setup ## Run a whole release on this machine: train, compile, gate, canary, promote, roll back
	$(RUN)/trainyard demo

.PHONY: test
test: test-packages setup check ## Run the checks, then the unit, integration and end-to-end tests
	@.ci/tests $(RUN)/pytest

.PHONY: soak
soak: soak-packages setup ## Run the long tests and the benchmarks, and print their figures
	@failed=; \
	$(RUN)/pytest -s -m "soak or benchmark" || failed="pytest"; \
	for script in $(BENCHMARKS); do \
	  echo "== $$script"; $(RUN)/python "$$script" || failed="$$failed $$script"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed: $$failed" >&2; exit 1; fi

.PHONY: test-cluster
test-cluster: setup ## Run the tests against the cluster of TRAINYARD_TEST_KUBECONFIG
	@$(RUN)/pytest -m cluster tests/cluster

.PHONY: check
check: $(AIRFLOW_STAMP) ## Check format, lint, types and import rules
	@$(RUN)/ruff format --check .
	@$(RUN)/ruff check .
	@$(RUN)/mypy
	@$(RUN)/lint-imports

.PHONY: up
up: up-$(PLATFORM) ## Start everything and leave it running; PLATFORM=compose uses containers

.PHONY: up-embedded
up-embedded: setup
	$(RUN)/trainyard up

.PHONY: up-compose
up-compose: docker-compose.pinned.yaml
	docker compose -f docker-compose.yaml -f docker-compose.pinned.yaml up --build --detach

.PHONY: down stop
down stop: down-$(PLATFORM) ## Stop all that `make up` or `make demo` left running

.PHONY: down-embedded
down-embedded:
	@if [ -x $(RUN)/trainyard ]; then $(RUN)/trainyard down; else echo "Nothing is installed, so nothing runs."; fi

.PHONY: down-compose
down-compose:
	@if [ -f .env ]; then docker compose --profile '*' down; else echo "There is no .env, so nothing runs."; fi

.env: .env.example
	@$(PYTHON) .ci/compose-env
	@touch $@

docker-compose.pinned.yaml: | .env
	@$(MAKE) pin-images

.PHONY: pin-images
pin-images: .env ## Find the digests of all images of docker-compose.yaml, as they are now
	@$(PYTHON) .ci/pin-images

.PHONY: clean
clean: ## Stop everything, then remove the environments and all data: .trainyard, Airflow's database
	@if [ -x $(RUN)/trainyard ]; then $(RUN)/trainyard down --remove-database; fi
	rm -rf .venv .venv-serve .venv-tools .trainyard .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

COMPILE = $(UV) pip compile --quiet $(UPGRADE) --custom-compile-command "make lock" \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--generate-hashes --no-emit-index-url --no-emit-find-links

.PHONY: lock
lock: $(TOOLS_STAMP) ## Write requirements/*.txt anew; UPGRADE=--upgrade takes newer versions
	@$(COMPILE) requirements/tools.in -o requirements/tools.txt >/dev/null
	@$(COMPILE) pyproject.toml --extra airflow --extra dev -o requirements/airflow.txt >/dev/null
	@$(COMPILE) pyproject.toml --extra serve --override requirements/serve-overrides.txt \
		$(TORCH_SOURCE) -o requirements/serve.txt >/dev/null

.PHONY: system-packages
system-packages:
	@PYTHON="$(PYTHON)" .ci/system-packages $(SYSTEM_PACKAGES)

.PHONY: test-packages soak-packages
test-packages:
	@PYTHON="$(PYTHON)" .ci/system-packages $(SYSTEM_PACKAGES) tests
soak-packages:
	@PYTHON="$(PYTHON)" .ci/system-packages $(SYSTEM_PACKAGES) soak

$(TOOLS_STAMP): | system-packages
	@echo "Installing uv into .venv-tools"
	@rm -f .venv-tools/.made-from-*
	@$(PYTHON) -m venv .venv-tools
	@.venv-tools/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/tools.txt
	@touch $@

# `sync` installs exactly the lock; it does not resolve again, so serve's overrides hold.
define install-lock
	@echo "Installing requirements/$(2).txt into $(1)"
	@rm -f $(1)/.made-from-* $(1)/.project-*
	@$(UV) venv --quiet --allow-existing --python "$(PYTHON)" $(1)
	@$(UV) pip sync --quiet --python $(1) --require-hashes --compile-bytecode $(3) requirements/$(2).txt
	@touch $@
endef

define install-project
	@rm -f $(1)/.project-*
	@$(UV) pip install --quiet --python $(1) --no-deps --editable .
	@touch $@
endef

$(AIRFLOW_LOCKED): $(TOOLS_STAMP)
	$(call install-lock,.venv,airflow,)

$(SERVE_LOCKED): $(TOOLS_STAMP)
	$(call install-lock,.venv-serve,serve,$(TORCH_SOURCE))

$(AIRFLOW_STAMP): $(AIRFLOW_LOCKED)
	$(call install-project,.venv)

$(SERVE_STAMP): $(SERVE_LOCKED)
	$(call install-project,.venv-serve)
