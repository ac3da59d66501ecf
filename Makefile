# Two commands for everybody: `make train` and `make test`. Both set up .venv by themselves, from Python 3.10 or newer
# and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
# For example: make train ARGS="--data pictures --rank 16"
ARGS ?=

BIN := $(VENV)/bin
# torch looks for ninja on the path.
export PATH := $(abspath $(BIN)):$(PATH)
CPP := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: train test lint format cpp-build cpp-test emulate-all resources bench figure pruning gpu dist clean

train: $(VENV)/package
	$(BIN)/python -m vitadapter_ext.train $(ARGS)

# One process for each core; ARGS="-n 0" for one alone.
test: lint cpp-test
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/tools
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

PRINT_CUDA_VERSION := 'import vitadapter_ext as va; print(va.build_info()["cuda_version"] or "")'

# The kernels without Python, under AddressSanitizer and UBSan; and every CUDA kernel compiled where nvcc is there and the
# package, which would have done it, was built without CUDA.
cpp-build: $(VENV)/tools
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) --log-level=WARNING \
	  -DVITADAPTER_COMPILE_CUDA=$(if $(shell $(BIN)/python -c $(PRINT_CUDA_VERSION)),OFF,ON)
	$(BIN)/cmake --build build/cmake

# Every CUDA kernel runs on the CPU there; each program prints how many cases.
cpp-test: cpp-build
	$(BIN)/ctest --test-dir build/cmake --output-on-failure --verbose --parallel 2

# Every combination of sizes and dtypes through every CUDA kernel on the CPU, on two cores: half an hour.
emulate-all: cpp-build
	build/cmake/cuda_test everywhere 1/2 & first=$$!; build/cmake/cuda_test everywhere 2/2; second=$$?; \
	  wait $$first && exit $$second

# Writes what ptxas said of every CUDA kernel into benchmarks/results/resources.md, where the package was built with CUDA.
# With ARGS=--check nothing is written: it fails where a kernel spills, nvcc warned or the committed table is an old one.
resources: cpp-build
	build/cmake/cuda_test launches > build/cmake/launches.json
	$(BIN)/python -m benchmarks.resources --launches build/cmake/launches.json $(ARGS)

# Times an op (adapter, arc, consolidator) beside plain PyTorch and torch.compile, into benchmarks/results. A part of one:
# make bench OP=arc ARGS="--cells --quick"
OP ?= adapter
bench: $(VENV)/tools
	$(BIN)/python -m benchmarks.bench_$(OP) $(ARGS)

# Draws benchmarks/results/digits.png: accuracy and trained parameters of the default run and its baselines.
figure: $(VENV)/package
	$(BIN)/python -m benchmarks.digits

# MiMi beside random pruning and adapters of its final size from scratch, five seeds each: 20 minutes on two cores.
pruning: $(VENV)/package
	$(BIN)/python -m benchmarks.mimi $(ARGS)

# On a machine with a GPU, with that machine's own Python and torch, without a network. Where there is no GPU the command
# says so and ends with 3. Some phases only: make gpu ARGS="build sweep"; another Python: make gpu PYTHON=/usr/bin/python3
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

# A wheel and an sdist, with what they need and nothing else.
dist: $(VENV)/tools
	rm -rf dist build/lib* build/bdist*
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' > build/sdist.log
	for archive in dist/*.whl dist/*.tar.gz; do $(BIN)/python -m tests.check_archive $$archive || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info vitadapter_ext/*.so

$(BIN)/python:
	@command -v "$${CXX:-c++}" > /dev/null || command -v g++ > /dev/null || command -v clang++ > /dev/null || \
	  (echo "a C++ compiler is needed; on Debian and Ubuntu: apt-get install g++ python3-dev"; false)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  (echo "vitadapter_ext needs Python 3.10 or newer; name one with 'make PYTHON=python3.12 ...'"; false)
	$(PYTHON) -m venv $(VENV) || \
	  (echo "no virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); false)

# What the package is built with comes first, so that it is built against the torch that it will run with.
$(VENV)/requirements: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet setuptools ninja pybind11 numpy "torch>=2.11" timm
	touch $@

# What torch compiles CUDA with; `make resources` reads the reports.
$(VENV)/package dist: export PYTORCH_NVCC ?= sh "$(CURDIR)/csrc/cuda/nvcc_with_report.sh"

$(VENV)/package: setup.py pyproject.toml csrc/cuda/nvcc_with_report.sh $(filter csrc/%,$(CPP)) | $(VENV)/requirements
	$(BIN)/pip install --quiet --no-build-isolation --editable .
	touch $@

$(VENV)/tools: pyproject.toml $(VENV)/package
	$(BIN)/pip install --quiet --group dev
	touch $@
