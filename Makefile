# Everything runs in .venv, which `make setup` makes. To use the active environment instead: make test PYTHON=python

ifdef PYTHON
PY := $(PYTHON)
READY := build/ready$(subst /,-,$(shell $(PYTHON) -c 'import sys; print(sys.prefix)' 2>/dev/null))
else
PY := .venv/bin/python
READY := .venv/.ready
VENV := .venv/bin/pip
endif

ARGS ?=
CXX_SOURCES := $(wildcard csrc/*.[ch]pp csrc/cpu/*.[ch]pp)
CXX_CHECKS := $(wildcard csrc/tests/*.[ch]pp csrc/fuzz/*.cpp)
BUILT_FROM := pyproject.toml setup.py constraints.txt $(CXX_SOURCES)
CLANG_FORMAT = "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"/clang-format

# For commands that run in another folder; a bare name is looked up on the PATH.
ABSOLUTE_PY = $(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY))

is_new_enough = -c 'import sys; sys.exit(sys.version_info < (3, 10))'
has_headers = -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'
has_compiler = set -- $${CXX:-g++} && command -v "$$1"

.DEFAULT_GOAL := help
.PHONY: help setup run test test-gpu test-gpu-sanitize bench-gpu kernels-report bench figures tune test-native test-native-sanitize campaign lint format clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=... on any of them uses that interpreter's environment in place of .venv"

setup: $(READY) ## Make .venv, build the extension, install what is needed

.venv/bin/pip:
	@command -v python3 >/dev/null || { echo "no python3 on the PATH: rmt-engine needs Python 3.10 or newer" >&2; exit 1; }
	@python3 $(is_new_enough) || { echo "$$(python3 --version) is too old: rmt-engine needs 3.10 or newer." \
	  "If you have one under another name: python3.12 -m venv .venv && make setup" >&2; exit 1; }
	python3 -m venv .venv

$(READY): $(BUILT_FROM) | $(VENV)
	@command -v $(PY) >/dev/null || { echo "no $(PY): PYTHON names the interpreter of the active environment" >&2; exit 1; }
	@$(PY) $(is_new_enough) || { echo "$(PY) is $$($(PY) --version 2>&1): rmt-engine needs Python 3.10 or newer" >&2; exit 1; }
	@$(has_compiler) >/dev/null || { echo "no C++ compiler ($${CXX:-g++}): the extension needs one that knows C++17;" \
	  "Debian and Ubuntu: apt install g++; or name yours: make setup CXX=clang++" >&2; exit 1; }
	@$(PY) $(has_headers) 2>/dev/null || { echo "no Python.h for $$($(PY) --version): the extension needs Python's headers;" \
	  "Debian and Ubuntu: apt install python3-dev" >&2; exit 1; }
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@mkdir -p $(@D) && touch $@

# One thread: so small a model gains nothing from two, and a busy core makes two wait for each other.
run: setup ## Read 2,000,000 tokens with a fact hidden in them, and ask for it
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) examples/two_million_tokens.py

test: setup ## Run every test that needs no GPU; ARGS='-k stream' goes to pytest
	OMP_NUM_THREADS=1 $(PY) -m pytest -m 'not gpu' $(ARGS)

test-gpu: setup ## Run the tests that need a CUDA device, then test-gpu-sanitize; with ARGS the tests alone
	$(PY) -m pytest -m gpu $(ARGS)
	$(if $(ARGS),,$(MAKE) test-gpu-sanitize)

# Without torch's cache every tensor has bounds of its own; but graphs cannot be captured then. A recurrence of a hundred
# segments shows a sanitizer nothing that one segment does not.
SANITIZED = compute-sanitizer --error-exitcode 1 $(PY) -m pytest -p no:cacheprovider
test-gpu-sanitize: setup ## Run the tests of kernels and graphs on a CUDA device under compute-sanitizer
	@command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer on the PATH: it comes with the CUDA toolkit" >&2; exit 1; }
	$(SANITIZED) -m gpu tests/test_graph_small.py $(ARGS)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZED) tests/triton_ops.py $(or $(ARGS),-k 'not error_rule_of_a_memory')

bench-gpu: setup ## Measure everything on a CUDA device, in under 9 minutes; ARGS='--output FILE.json' names the result
	$(PY) benchmarks/bench_gpu.py $(or $(ARGS),--output benchmarks/results/gpu.json)

kernels-report: setup ## Compile every launch of the GPU kernels, without a GPU, and write kernels/REPORT.md
	OMP_NUM_THREADS=1 $(PY) kernels/report.py $(ARGS)

tune: setup ## Tune the launch configurations of the card in this machine; ARGS='--backbone gpt2'
	$(PY) kernels/tune.py $(ARGS)

test-native: ## Run the C++ tests alone; SANITIZE=address,undefined or SANITIZE=thread
	$(MAKE) -C csrc test

test-native-sanitize: setup ## Run the C++ tests and the extension's Python tests under ASan, UBSan and TSan
	for sanitizer in address,undefined thread; do \
	  OMP_NUM_THREADS=1 $(MAKE) -C csrc test test-module SANITIZE=$$sanitizer PYTHON='$(ABSOLUTE_PY)' || exit 1; done

# The suite's own models are small: one thread. -p no:cacheprovider: nothing is left beside the sources.
SUITE := benchmarks/bench_ops.py benchmarks/bench_segment.py benchmarks/bench_stream.py
bench: setup ## Run the CPU benchmarks, compare with the committed ones; ARGS='-k stream' runs some
	@mkdir -p build && rm -f build/bench-*.json
	for pass in 1 2; do OMP_NUM_THREADS=1 $(PY) -m pytest -p no:cacheprovider $(SUITE) \
	  --benchmark-json build/bench-$$pass.json --benchmark-max-time=0.5 --benchmark-timer=time.process_time \
	  --benchmark-columns=min,median,rounds $(ARGS) || exit 1; done
	$(PY) benchmarks/compare.py build/bench-*.json $(if $(ARGS),--some)

figures: setup ## Draw the figures of README and docs from the committed results
	@$(PY) -c 'import matplotlib' 2>/dev/null || $(PY) -m pip install -q --disable-pip-version-check 'matplotlib>=3.8'
	$(PY) benchmarks/figures.py

campaign: setup ## Damage files, kill runs and fail disks at full count; ARGS='states --count 500 --seed 7' chooses
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(PY) -m campaign $(ARGS)

lint: setup ## Check style and types: ruff, mypy, clang-format
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_SOURCES) $(CXX_CHECKS)

format: setup ## Format Python and C++ in place
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(CLANG_FORMAT) -i $(CXX_SOURCES) $(CXX_CHECKS)

clean: ## Remove what was built; .venv and run/ stay
	rm -rf build dist *.egg-info rmt_engine/_C.*.so kernels/rmt_kernels/_cpu.*.so .venv/.ready
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
