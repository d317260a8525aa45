# `make` alone lists the targets. The environment lives in .venv and is made when a target first needs it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV        ?= .venv
BIN         := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
# The CUDA extra, cu13 or cu12 as torch was built. It installs without a GPU too, and compiles the kernels there.
CUDA        ?= cu13
EXTRAS      ?= dev,report,$(CUDA)
# More arguments for pytest: make test ARGS="-k packing -x"
ARGS        ?=

ROOMS := calib formats kernels recipes
CODE  := qoq_cli $(ROOMS) tests $(wildcard benchmarks)

# Tests run without a network, and one thread a process: xdist already gives every core a process.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST   := $(TEST_ENV) $(BIN)/pytest
PARALLEL := -n logical --maxprocesses 8

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# ---- environment

PYTHONS   := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
comma     := ,
STAMP     := $(VENV)/.setup-$(subst $(comma),-,$(EXTRAS))

.PHONY: setup
setup: $(STAMP) ## make .venv with the pinned packages (PYTHON=python3.12 picks the interpreter)

# pip comes last into a new environment: without it an earlier attempt was cut short.
$(BIN)/pip:
	@for candidate in $(PYTHONS); do \
	  if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "$$candidate -m venv $(VENV)"; exec "$$candidate" -m venv $(VENV); \
	  fi; \
	done; \
	echo "setup: no Python 3.11 or newer with its venv module found (tried: $(PYTHONS))." \
	  "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; \
	exit 3

$(STAMP): pyproject.toml $(wildcard constraints*.txt) | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

# ---- the main job

.PHONY: demo
demo: export PATH := $(CURDIR)/$(BIN):$(PATH)
demo: export HF_HUB_OFFLINE := 1
demo: setup ## quantize the embedded model two ways, verify, compare (no GPU, no network)
	qoq quantize tiny --recipe rtn-g128 -o build/demo/tiny-rtn --restart
	qoq quantize tiny --recipe qoq-g128 -o build/demo/tiny-qoq --restart
	qoq verify build/demo/tiny-qoq --against tiny
	qoq eval build/demo/tiny-rtn build/demo/tiny-qoq --baseline tiny --ppl builtin

.PHONY: bench
bench: export PATH := $(abspath $(BIN)):$(PATH)
bench: setup ## tables of benchmarks/ that need no download: accuracy of tiny, peak memory, projection (half an hour)
	python benchmarks/ablation.py qoq_cli/demo/tiny --calib qoq_cli/demo/tiny/calibration.txt --samples 64 --seq-len 512 \
	  --limit 49 --evaluation qoq_cli/demo/tiny/evaluation.txt --device cpu --out benchmarks/ablation-tiny.json
	python benchmarks/key_outliers.py tiny --calib qoq_cli/demo/tiny/calibration.txt --seq-len 512 --limit 49 --samples 64 \
	  --evaluation qoq_cli/demo/tiny/evaluation.txt --device cpu --out benchmarks/key-outliers-tiny.json
	python benchmarks/peak_memory.py --out benchmarks/peak-memory.json
	python benchmarks/projection_validation.py --out benchmarks/projection-validation.json
	python benchmarks/projection_kernels.py

.PHONY: bench-gpu
bench-gpu: setup ## tables of benchmarks/ that need a GPU, named after it: all, or make bench-gpu ARGS="products layers"
	$(BIN)/python benchmarks/gpu_tables.py $(ARGS)

# ---- tests

.PHONY: test
test: setup ## fast tests, on the CPU
	$(PYTEST) $(PARALLEL) -m "not slow" $(ARGS)

.PHONY: test-slow
test-slow: setup ## the slow tests: wheel installation, whole runs
	$(PYTEST) -m "slow and not gpu" $(ARGS)

.PHONY: test-gpu
test-gpu: setup ## tests that need a GPU; fails when every one was skipped
	@mkdir -p build
	$(PYTEST) -m gpu -rs --junitxml=build/test-gpu.xml $(ARGS)
	@$(BIN)/python -c 'import sys; from xml.etree import ElementTree; \
	suite = ElementTree.parse("build/test-gpu.xml").find("testsuite").attrib; \
	ran = int(suite["tests"]) - int(suite["skipped"]); \
	sys.exit(None if ran else "test-gpu: every GPU test was skipped; `qoq doctor` says what is missing")'

.PHONY: test-lm-eval
test-lm-eval: ## tests of qoq eval --tasks and --longbench, with lm-eval in an environment of its own
	$(MAKE) test VENV=.venv-lm-eval CONSTRAINTS=constraints-lm-eval.txt EXTRAS=dev,lm-eval,longbench \
	  ARGS="tests/qoq_cli/test_eval_tasks.py tests/qoq_cli/test_longbench.py"

.PHONY: test-vllm
test-vllm: ## tests of the vLLM plug-in, with vLLM in an environment of its own (a download of gigabytes)
	$(MAKE) test VENV=.venv-vllm CONSTRAINTS=constraints-vllm.txt EXTRAS=dev,vllm \
	  ARGS="$(wildcard tests/kernels/test_vllm_*.py)"

.PHONY: kernels
kernels: setup ## compile every kernel for every architecture; prints registers, fails on spills (no GPU; some minutes)
	$(BIN)/python tests/compile_kernels.py

.PHONY: sanitize
sanitize: setup ## the small GPU tests under compute-sanitizer: memcheck, synccheck, racecheck
	for tool in memcheck "synccheck --num-cuda-barriers 16384" racecheck; do \
	  echo "compute-sanitizer $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 1 --kernel-regex kns=qoq \
	    $(BIN)/python -m pytest -m gpu -k "small and not graph" -x -q -p no:cacheprovider tests/kernels/gpu; \
	done

.PHONY: tune
tune: setup ## measure the GEMM's tiles on this GPU and write the best into kernels/tables/gemm.json
	$(BIN)/python benchmarks/tune_gemm.py --write

# ---- checks

.PHONY: check
check: fmt-check lint types contracts ## formatting, lint, types, direction of imports

.PHONY: fmt
fmt: setup ## format the code and sort the imports
	$(BIN)/ruff check --quiet --select I --fix $(CODE)
	$(BIN)/ruff format $(CODE)

.PHONY: fmt-check
fmt-check: setup
	$(BIN)/ruff format --check $(CODE)

.PHONY: lint
lint: setup ## ruff
	$(BIN)/ruff check $(CODE)

# Static tools cannot follow the import hook of an editable install: they read the same files through a tree of links
# that has the installed names.
.PHONY: typed-tree
typed-tree:
	@mkdir -p build/typed/qoq
	@for room in $(ROOMS); do ln -sfn ../../../$$room build/typed/qoq/$$room; done
	@ln -sfn ../../qoq_cli build/typed/qoq_cli

.PHONY: types
types: setup typed-tree ## mypy, strict
	MYPYPATH=build/typed $(BIN)/mypy -p qoq -p qoq_cli

.PHONY: contracts
contracts: setup typed-tree ## which room may import which (import-linter)
	PYTHONPATH=build/typed $(BIN)/lint-imports --no-logo --no-cache

# ---- packages

.PHONY: wheel
wheel: setup ## build sdist and wheel into dist/
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --outdir dist

.PHONY: clean
clean: ## remove everything built or cached, but .venv and checkpoints
	rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
