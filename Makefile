# The two commands of the README, `make train` and `make test`; both set up .venv by themselves.
PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= configs/des-loc-adam-qh.json
ARGS   ?=
FOLDER ?= build/matrix
GPU_ARGS ?=
GPU_PACK ?= build/gpu-pack
GPU_MODULE ?=
PYTESTS ?= 2
CPP    := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp' -o -name '*.c')
PIP    := $(VENV)/bin/pip --disable-pip-version-check -q install -c constraints.txt

.PHONY: train test test-all check format bench gpu gpu-pack docs matrix cuda-build clean

train: $(VENV)/ready
	$(VENV)/bin/python examples/train.py --config $(CONFIG) $(ARGS)

# two processes at once, since a test of four ranks waits more than it computes; a file's tests stay in one, with its world
test: check
	$(VENV)/bin/python -m pytest -n $(PYTESTS) --dist loadfile --no-loadscope-reorder $(ARGS)

# and what takes long, or repeats an assertion in another combination: before a release
test-all: check
	$(VENV)/bin/python -m pytest -m "" -n $(PYTESTS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/ready
	$(VENV)/bin/ruff format --check --quiet
	$(VENV)/bin/ruff check --quiet
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(VENV)/bin/mypy

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix --quiet
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CPP)

bench: $(VENV)/ready
	$(VENV)/bin/python -m benchmarks.kernels.overhead $(ARGS)

# all that one GPU can say, in order of worth: GPU_ARGS="--limit 600", or "--device cpu" for the dry run
gpu: $(VENV)/ready
	$(VENV)/bin/python benchmarks/gpu/plan.py $(GPU_ARGS)

# for a GPU machine without network: there, python3 benchmarks/gpu/plan.py --pack build/gpu-pack; GPU_MODULE is a
# _C.abi3.so that is built already
gpu-pack: $(VENV)/ready
	$(VENV)/bin/python -m benchmarks.gpu.pack --folder $(GPU_PACK) $(if $(GPU_MODULE),--module $(GPU_MODULE))

# the pages as a site under build/site; docs/index.md is README with links of its own
docs: $(VENV)/ready
	$(PIP) mkdocs-material
	sed -e 's,](docs/,](,g' -e 's,\[\([^]]*\)\](C[A-Z]*\.md),`\1`,g' README.md > docs/index.md
	$(VENV)/bin/mkdocs build --strict --quiet

# every row of docs/versions.md, each in an environment of its own under FOLDER
matrix: $(VENV)/ready
	$(VENV)/bin/python -m tests.support.matrix --folder $(FOLDER) $(ARGS)

# the module with CUDA into build/cuda/, and a look at what nvcc and the linker made: needs nvcc, no GPU, and minutes
cuda-build: $(VENV)/ready
	$(VENV)/bin/python -m benchmarks.kernels.cuda_build $(ARGS)

# torch comes first and nothing is built in isolation: an isolated build would fetch another torch, of gigabytes
$(VENV)/ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
