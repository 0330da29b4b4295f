# Shortcuts for development; README.md says how to install and test without make.
PYTHON ?= python3
BIN := .venv/bin
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

.PHONY: setup check format test test-fast fuzz docs kernels bench gpu-check constraints

setup: .venv/ready  ## an environment to develop in

check: .venv/ready  ## lint and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: .venv/ready  ## rewrite the source in the house's format
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

test: .venv/ready  ## the test suite
	$(BIN)/python -m pytest -q -n auto --dist loadfile tests

test-fast: .venv/ready  ## the quick part of it, in two minutes
	GPT2FAST_TEST_FAST=1 $(BIN)/python -m pytest -q -n auto --dist worksteal tests

fuzz: .venv/ready  ## every reader of files, or TARGET=config; SECONDS=60 for each
	$(BIN)/python tests/fuzz/run.py $(TARGET) $(if $(SECONDS),--seconds $(SECONDS))

docs: .venv/ready  ## the API reference, in build/docs
	$(BIN)/python docs/reference.py

kernels:  ## the C++ kernels and their own tests; SANITIZE=address,undefined or thread watches them
	cmake -S . -B build-kernels -DGPT2FAST_SANITIZE=$(SANITIZE)
	cmake --build build-kernels --parallel
	ctest --test-dir build-kernels --output-on-failure

bench: .venv/ready  ## ours beside torch and transformers
	$(BIN)/python -m pytest -q benchmarks

gpu-check:  ## all that can be checked on a GPU, with what is installed there (OUT=folder)
	$(PYTHON) benchmarks/gpu_check.py $(if $(OUT),--out $(OUT))

constraints:  ## resolve constraints.txt again, for every Python and platform (needs uv)
	printf 'torch==2.13.0\nnumpy<2.4\n' | uv pip compile pyproject.toml --extra dev --extra cuda --universal \
	    --python-version 3.10 --no-annotate --custom-compile-command "make constraints" \
	    --constraints - --output-file constraints.txt
