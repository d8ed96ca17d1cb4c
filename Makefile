# Everything a contributor runs. `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

# Unit tests need no core but their own. The others are systems that have all cores to themselves.
PARALLEL := -n logical --maxprocesses 8

# Which tests `make check` runs; none where `make test` follows, which runs them too.
FAST_TESTS ?= tests/unit

.PHONY: help demo test check proto format soak gpu-test gpu-bench bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml client/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e ./client -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Start router, prefill and decode, send prompts, show tokens and a summary
	$(BIN)/twinpool demo

test: $(STAMP) ## Run the tests
	$(BIN)/pytest $(PARALLEL) tests/unit
	$(BIN)/pytest tests/integration

check: $(STAMP) ## Format, lint, types, import floors, generated code, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python proto/generate.py --check
	$(if $(FAST_TESTS),$(BIN)/pytest $(PARALLEL) $(FAST_TESTS))

proto: $(STAMP) ## Generate the wire types from proto/
	$(BIN)/python proto/generate.py

format: $(STAMP) ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: $(STAMP) ## Long fault tests: kill processes at random points, many times
	$(BIN)/pytest $(PARALLEL) tests/unit --hypothesis-profile default
	$(BIN)/pytest tests/unit tests/integration -m slow --timeout 600
	$(BIN)/pytest tests/soak -s --timeout 3600
	TWINPOOL_FUZZ_REQUESTS=1000000 $(BIN)/pytest tests/unit/router/test_fuzz.py -s --timeout 3600
	TWINPOOL_FUZZ_REQUESTS=50000 $(BIN)/pytest tests/integration/test_fuzz.py -s --timeout 3600

# A machine with a GPU may have an environment of its own: make gpu-test GPU_PYTHON=python3.
GPU_PYTHON ?= $(BIN)/python
GPU_RESULTS ?= bench/results/gpu
KERNEL_TESTS := $(addprefix tests/unit/,engine/kernels/gpu engine/test_cache_memory.py bench/test_kernels.py)
ONE_OF_EACH_KERNEL := $(GPU_PYTHON) -m pytest tests/unit/bench/test_kernels.py -k every_case
# Without torch's own pools, memory beside a tensor is nobody's.
SANITIZE := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool

# Where tests of kernels run on a GPU most of their time is the compiler's, on a core each.
gpu-test: ## With a GPU: the tests of what computes there, and each kernel under compute-sanitizer
	$(GPU_PYTHON) -m pytest $(PARALLEL) $(KERNEL_TESTS) tests/unit/bench/gpus
	$(GPU_PYTHON) -m pytest tests/integration/test_apart.py
	$(SANITIZE) memcheck $(ONE_OF_EACH_KERNEL)
	$(SANITIZE) racecheck $(ONE_OF_EACH_KERNEL)

gpu-bench: $(addprefix gpu-bench-,kernels decode prefill transfer) ## With a GPU: all that is measured on one, into GPU_RESULTS (-k: whatever fails)

gpu-bench-kernels: TUNE := --tune
gpu-bench-%:
	mkdir -p $(GPU_RESULTS)
	$(GPU_PYTHON) -m bench.$* --device cuda $(TUNE) --json $(GPU_RESULTS)/$*.json

bench: $(STAMP) ## What disaggregation adds to a request
	$(BIN)/python -m bench.overhead

clean: ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
