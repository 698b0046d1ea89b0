# make quickstart   train a LoRA adapter on a real model, from nothing, in one command
# make test         the whole test suite, beside the reference implementation
# make lint         formatting, lint and types
# make bench        speed and memory against the reference
# make docs         regenerate what is generated in README.md and docs/
# make clean        remove environments, caches and outputs

PYTHON    ?= python3
VENV      ?= .venv
REFERENCE ?= .reference
WORKERS   ?= 2
ARGS      ?=

BIN := $(VENV)/bin

# PyPI's torch for Linux carries CUDA (gigabytes). Where PyTorch's CPU index answers, take the CPU build from there;
# `make TORCH_INDEX=` takes whatever pip is configured to find.
CPU_INDEX   := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(shell [ "$$(uname)" = Linux ] && curl -fsSI -m 5 -o /dev/null $(CPU_INDEX)/torch/ 2>/dev/null && echo $(CPU_INDEX))
PIP_INSTALL  = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
               $(addprefix --extra-index-url ,$(TORCH_INDEX))

.PHONY: quickstart test lint bench docs clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.quickstart
	@$(BIN)/peft quickstart $(ARGS)

test: $(VENV)/.test $(REFERENCE)/.installed
	PEFT_REFERENCE=$(abspath $(REFERENCE)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.test $(REFERENCE)/.installed
	PEFT_REFERENCE=$(abspath $(REFERENCE)) $(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.dev
	$(BIN)/python tools/docs.py $(ARGS)

clean:
	rm -rf $(VENV) $(REFERENCE) build dist quickstart-out .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "Creating $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)

# One stamp per extra: an unchanged pyproject.toml and constraints.txt mean nothing to install.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing peft[$*] into $(VENV); the first time takes a few minutes ..."
	@$(PIP_INSTALL) -e '.[$*]'
	@touch $@

# The reference implementation, apart from the environment: the tests run it in processes of its own.
$(REFERENCE)/.installed: tests/reference/install.py | $(BIN)/python
	@echo "Installing the reference implementation into $(REFERENCE) ..."
	@rm -rf $(REFERENCE)
	@PEFT_REFERENCE=$(abspath $(REFERENCE)) $(BIN)/python -c 'from tests.reference.install import ensure_reference as go; go()'
	@touch $@
