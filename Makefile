# Everything by two commands: `make demo` and `make test`. Both set up what they need in .venv,
# from a machine that has Python >= 3.10, make and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
# What pip installs for torch, pinned for development; the package itself takes any torch >= 2.6.
# Without a GPU this spares a large download on Linux:
#   make demo TORCH="torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# One process a core; each takes its tests in their order, in which neighbours share an oracle.
PARALLEL ?= --numprocesses=auto --dist=worksteal
BENCH_ARGS ?=
DEMO_ARGS ?=
KERNELS_ARGS ?=
GPU_ARGS ?=
# A minor version of Triton, 3.6 say, for `make kernels` to compile with instead of the one in .venv.
TRITON ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Folders too: a file added or removed changes its folder's time.
NATIVE_SOURCES := $(shell find csrc -name '.*' -prune -o -print)
CPP_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

SANITIZED := build/sanitize
SANITIZER_LIBS = $(foreach lib,libasan.so libubsan.so libstdc++.so.6,$(shell $(or $(CXX),g++) -print-file-name=$(lib)))

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint docs format build sanitize mutants cuda-mutants kernels gpu setup native nvcc clean
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## *' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- Setting up ----------------------------------------------------------------------------------

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "Python 3.10 or newer is needed; choose one with: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	    || { echo "No virtual environment could be made (Debian, Ubuntu: apt install python3-venv)" >&2; \
	         rm -rf $(VENV); exit 1; }

$(VENV)/.stamp-torch: $(VENV)/pyvenv.cfg
	@echo "[setup] $(firstword $(TORCH)) and the build tools, into $(VENV)"
	@$(PIP) "setuptools>=77" "pybind11>=2.13" ninja $(TORCH)
	@touch $@

# Objects stay in build/, so that installing again compiles only what changed.
$(VENV)/.stamp-demo: $(VENV)/.stamp-torch pyproject.toml setup.py
	@echo "[setup] transformer_fast with what the demo needs (compiles the native code)"
	@$(PIP) --no-build-isolation --editable ".[demo]"
	@touch $@ $(VENV)/.stamp-native

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch pyproject.toml setup.py
	@echo "[setup] transformer_fast with what tests, linters and benchmarks need (compiles the native code)"
	@$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@ $(VENV)/.stamp-demo $(VENV)/.stamp-native

$(VENV)/.stamp-native: $(NATIVE_SOURCES) setup.py | $(VENV)/.stamp-torch
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

setup: $(VENV)/.stamp-dev $(VENV)/.stamp-native  ## everything a developer needs, into .venv

native: $(VENV)/.stamp-torch  ## rebuild the native module in place (only what changed)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $(VENV)/.stamp-native

nvcc: $(VENV)/.stamp-torch  ## NVIDIA's compiler, into .venv, where this machine has none
	@$(BIN)/python csrc/cuda/toolkit.py \
	    || { echo "[setup] nvcc, into $(VENV)"; $(PIP) $(addsuffix ==13.*,nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl); }

# --- The commands --------------------------------------------------------------------------------

demo: $(VENV)/.stamp-demo $(VENV)/.stamp-native  ## the tour: real text, real models, our kernels
	$(BIN)/transformer-fast demo $(DEMO_ARGS)

test: $(VENV)/.stamp-dev $(VENV)/.stamp-native  ## the whole test suite
	$(BIN)/pytest $(PARALLEL) $(PYTEST_ARGS)

bench: $(VENV)/.stamp-dev $(VENV)/.stamp-native  ## speed against the peers, as ratios
	$(BIN)/transformer-fast bench $(BENCH_ARGS)

lint: $(VENV)/.stamp-dev  ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES))

$(VENV)/.stamp-docs: $(VENV)/.stamp-dev
	@echo "[setup] mkdocs-material, into $(VENV)"
	@$(PIP) mkdocs-material
	@touch $@

docs: $(VENV)/.stamp-docs  ## the documentation, into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(VENV)/.stamp-dev  ## put the sources in the house format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

build: $(VENV)/.stamp-dev  ## an sdist and a wheel, into dist/
	$(BIN)/python -m build --no-isolation

# A full copy of the package with a sanitized module, put first on the path. A test of its own
# fails when another copy is imported. Python's own allocations are not freed at exit: no leak check. Of
# the CUDA kernels, where the emulator is built, one of the two types: the other is the same code.
sanitize: $(VENV)/.stamp-dev  ## the native tests under AddressSanitizer and UBSan
	rm -rf $(SANITIZED)
	TRANSFORMER_FAST_SANITIZE=1 TRANSFORMER_FAST_KERNELS=bf16,key_ranges $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)
	LD_PRELOAD="$(SANITIZER_LIBS)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	PYTHONPATH="$(CURDIR)/$(SANITIZED)" TRANSFORMER_FAST_EXPECTED_COPY="$(CURDIR)/$(SANITIZED)" \
	$(BIN)/pytest -p no:cacheprovider --capture=sys -m sanitize $(PYTEST_ARGS)

kernels: $(VENV)/.stamp-dev $(VENV)/.stamp-native $(addprefix build/triton-,$(TRITON))  ## what the GPU kernels compile to, without a GPU
	$(if $(TRITON),PYTHONPATH=build/triton-$(TRITON)) $(BIN)/transformer-fast kernels $(if $(TRITON),--only triton) \
	    --output reports/kernels$(TRITON:%=-%) $(KERNELS_ARGS)

# Another version of Triton, in a folder of its own that is put first on the path.
build/triton-%: | $(VENV)/pyvenv.cfg
	@echo "[setup] Triton $*, into $@"
	@rm -rf $@.part
	@$(PIP) --no-deps --only-binary :all: --target $@.part "triton==$*.*"
	@mv $@.part $@

# Where pip can reach nothing: python benchmarks/on_gpu.py needs PyTorch and Triton alone.
gpu: $(VENV)/.stamp-dev $(VENV)/.stamp-native  ## correctness and speed on this machine's GPU; a dry run where there is none
	$(BIN)/python benchmarks/on_gpu.py $(GPU_ARGS)

mutants: $(VENV)/.stamp-dev $(VENV)/.stamp-native  ## plant faults one at a time; the tests must catch each
	$(BIN)/python tests/mutants.py

cuda-mutants: $(VENV)/.stamp-dev $(VENV)/.stamp-native  ## the same with the synchronisations of the CUDA kernels, in the emulator
	$(BIN)/python tests/cuda/mutants.py --table tests/cuda/mutants.md

clean:  ## remove what was built (.venv stays)
	rm -rf build dist *.egg-info transformer_fast/*.so .mypy_cache .pytest_cache .ruff_cache
	rm -f $(VENV)/.stamp-native
