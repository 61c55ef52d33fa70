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
TEST_CSRC := $(sort $(shell find tests -name '*.h' -o -name '*.cpp'))
# The one about GPUs is run by `make gpu`.
BENCHMARKS := $(filter-out benchmarks/bench_gpu.py,$(sort $(wildcard benchmarks/bench_*.py)))
STAMP := $(VENV)/.nexus-setup

.DELETE_ON_ERROR:
.PHONY: setup build test demo bench gpu gpu-site lint types check wheel clean

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

# A file's tests share what is slow to make, so a file is one worker's.
WORKERS ?= 2

test: setup
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile $(PYTEST_ARGS)

demo: setup
	$(BIN)/nexus demo

bench: setup
	for bench in $(BENCHMARKS); do $(BIN)/python $$bench || exit 1; done

# -- on a machine with a GPU: its own torch, perhaps no network, nothing installed, eight minutes --

GPU_PYTHON ?= python3
GPU_JSON ?=
# The package laid out as it would be installed; nexus_ext.kernels exists only there.
GPU_SITE ?= $(abspath build/gpu)
GPU_PATH = PYTHONPATH=$(GPU_SITE)$(if $(PYTHONPATH),:$(PYTHONPATH))
# All others may import what is not there. Those of the kernels run on what there is, without marks.
GPU_TESTS = $(shell grep -lE 'mark\.(needs_cuda|takes_simcuda)' tests/test_*.py)
GPU_KERNEL_TESTS := tests/test_quant_cuda.py tests/test_triton_kernels.py
# Compiling takes most of the time; pytest-xdist is used where it is there.
GPU_WORKERS = $(shell $(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses=8)
# Seconds, then arguments. Without pytest-timeout its option in pyproject.toml is unknown.
GPU_PYTEST = $(GPU_PATH) FAIL_WITHOUT_CUDA=1 timeout --kill-after=5 $(1) $(GPU_PYTHON) \
	-m pytest -q -rfE -p no:cacheprovider $(GPU_WORKERS) \
	-W 'ignore:Unknown config option:pytest.PytestConfigWarning'

# Around the extension that is here, if it can be loaded; build it after the last change of csrc/.
gpu-site:
	rm -rf $(GPU_SITE)
	$(GPU_PYTHON) setup.py -qq build_py --build-lib $(GPU_SITE) egg_info --egg-base $(GPU_SITE)
	cp nexus_ext/*.so $(GPU_SITE)/nexus_ext/ && $(GPU_PATH) $(GPU_PYTHON) -c 'import nexus_ext' \
		|| timeout 120 $(GPU_PYTHON) setup.py -q build_ext --build-lib $(GPU_SITE)

gpu: gpu-site
	failed=0; \
	$(call GPU_PYTEST,80) -m 'needs_cuda or takes_simcuda' $(GPU_TESTS) || failed=1; \
	$(call GPU_PYTEST,60) $(GPU_KERNEL_TESTS) || failed=1; \
	$(GPU_PATH) $(GPU_PYTHON) benchmarks/bench_gpu.py $(if $(GPU_JSON),--json $(GPU_JSON)) \
		|| failed=1; \
	exit $$failed

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(TEST_CSRC)

types: setup
	$(BIN)/mypy

check: lint types test

wheel: setup
	$(BIN)/python -m pip wheel -qq --no-build-isolation --no-deps -w dist .

# The stamp goes too: the extension it vouches for is gone.
clean:
	rm -rf build dist *.egg-info nexus_ext/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(STAMP)
