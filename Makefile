# The words of this repository. `make demo` and `make test` work on a fresh clone.

# The top-level folder kernels/ must not shadow Hugging Face's `kernels` package.
export PYTHONSAFEPATH := 1

VENV ?= .venv
PYTHON ?= python3

BIN := $(VENV)/bin
# torch's build helper looks for ninja on the path.
export PATH := $(abspath $(BIN)):$(PATH)

# Without a GPU, one exact version: an open one would bring a CUDA build of several GB.
ifeq ($(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu),gpu)
TORCH ?= torch>=2.11
else
TORCH ?= torch==2.13.0
endif

CONSTRAINT := $(VENV)/torch-constraint.txt
# Twice quiet shows errors, a failed build's whole output included, and no warnings.
PIP_INSTALL := $(BIN)/python -m pip install -qq --constraint $(CONSTRAINT)
# What it declares besides is a CUDA toolkit, which its reads do not need.
KVIKIO := kvikio-cu13 libkvikio-cu13 rapids-logger nvidia-cufile cuda-pathfinder
CSRC := $(sort $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu'))
BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))
STAMP := $(VENV)/.nexus-setup

.DELETE_ON_ERROR:
.PHONY: setup build test demo bench lint types check wheel clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml setup.py $(CSRC) | $(BIN)/python
	printf '%s\n' '$(TORCH)' > $(CONSTRAINT)
	$(PIP_INSTALL) '$(TORCH)'
	$(PIP_INSTALL) 'setuptools>=77' wheel ninja nvidia-nvtx
	$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	$(PIP_INSTALL) --no-deps $(KVIKIO)
	touch $@

build: setup
	$(BIN)/python setup.py -q build_ext --inplace

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

demo: setup
	$(BIN)/nexus demo

bench: setup
	for bench in $(BENCHMARKS); do $(BIN)/python $$bench || exit 1; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

types: setup
	$(BIN)/mypy

check: lint types test

wheel: setup
	$(BIN)/python -m pip wheel -qq --no-build-isolation --no-deps -w dist .

# The stamp goes too: the extension it vouches for is gone.
clean:
	rm -rf build dist *.egg-info nexus_ext/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(STAMP)
