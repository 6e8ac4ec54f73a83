# Every target works on a bare machine that has Python 3.11 or newer with pip; `make` alone lists them.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.docs-installed
WORKERS ?= 2
# One thread a process: the tests' tensors are tiny, and `-n` already keeps the cores busy. Neighbours stay together, for
# what they share is made once a process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-page test-kernels test-oldest lint format map docs gpu-bundle clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Train a tiny model and watch it write
	$(BIN)/opencola demo

test: lint  ## Lint, type-check and run the fast tests
	$(PYTEST)

test-slow: $(STAMP)  ## Run the slow tests
	$(PYTEST) -m slow

test-page: $(STAMP)  ## Run the tests of the server's page in headless Chromium; screenshots lie in build/screenshots
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/serve/test_page*.py

test-kernels: $(STAMP)  ## Run the kernels' tests by clang and for other processors
	$(PYTEST) -m slow tests/kernels/test_variants.py tests/kernels/test_wheel.py

# torch's wheel alone, without the 3 GB of CUDA packages that it names: tests/without_cuda.py has it load without them.
OLDEST := build/oldest
OLDEST_PIP = PIP_CONSTRAINT=$(1) $(OLDEST)/bin/python -m pip install --quiet --no-compile
test-oldest:  ## Run the tests of attention, flow and parity with the oldest torch that pyproject.toml admits
	$(PYTHON) -m venv --clear $(OLDEST)
	$(call OLDEST_PIP,) --no-deps torch==$$(sed -n 's/.*"torch>=\(.*\)".*/\1/p' pyproject.toml).*
	$(call OLDEST_PIP,constraints.txt) --no-deps torchdiffeq
	$(call OLDEST_PIP,constraints.txt) filelock fsspec jinja2 networkx setuptools sympy typing_extensions \
		huggingface_hub hypothesis numpy pytest pytest-xdist pyyaml rich safetensors scipy tokenizers tyro
	cd build && oldest/bin/python -c 'import torch' 2>/dev/null || \
		oldest/bin/python ../tests/without_cuda.py $$(echo oldest/lib/python3*/site-packages)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) -q tests/layers/test_packed.py tests/flow \
		tests/models/test_devices.py tests/train/test_optimizer.py tests/checkpoints/test_parity_*.py

lint: $(STAMP)  ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)  ## Fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

map:  ## Make the guide's map of the files again
	$(PYTHON) docs/make_map.py

docs: $(DOCS_STAMP)  ## Build the site into site/ and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "site/index.html"

# For CPython 3.12 on x86-64 Linux. Left out are torch and what comes with it, what only draws or reads .parquet files, and
# scipy, without which a Cola DLM's scores are not checked.
GPU_WHEELS := filelock huggingface_hub hypothesis numpy pytest pyyaml rich safetensors tokenizers tyro
GPU_PIP := PIP_CONSTRAINT=constraints.txt $(PYTHON) -m pip download --quiet --dest build/gpu/wheels \
	--only-binary=:all: --python-version 3.12 --implementation cp \
	$(patsubst %,--platform %_x86_64,manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014)
gpu-bundle:  ## Lay ready in build/gpu what a GPU's machine without a network needs to be checked
	rm -rf build/gpu
	mkdir -p build/gpu/source
	cp -R opencola benchmarks tests recipes pyproject.toml build/gpu/source
	find build/gpu -name __pycache__ -type d -prune -exec rm -rf {} +
	if [ -d "$$OPENCOLA_SHARED/golden" ]; then cp -R "$$OPENCOLA_SHARED/golden" build/gpu; fi
	$(GPU_PIP) $(GPU_WHEELS)
	$(GPU_PIP) --no-deps torchdiffeq
	echo 'exec bash "$$(dirname "$$0")/source/benchmarks/gpu/run.sh" "$$@"' > build/gpu/run.sh
	@du -sh build/gpu

clean:  ## Remove the virtualenv, caches and build outputs (not your runs)
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Remade when the dependencies change. The environment variables pin the build backend's own environment too
# (pip before 25.3 reads the first name, later ones the second).
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: OpenCola needs Python 3.11 or newer, and none was found on PATH;" \
		"install one or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: PYTHON=$(PYTHON) is not Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make a virtualenv (no venv" \
		"or ensurepip module); on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

# What builds the site; nothing else needs it.
$(DOCS_STAMP): $(STAMP)
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@
