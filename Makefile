# make demo   set everything up, tune a real small LLaMA, evaluate, merge, verify
# make test   linters, types and all tests
# make lowest the quick tests, on the lowest versions that pyproject.toml allows
# make docs   the documentation as a site, in site/
# make gpu    tests and step benchmark on a CUDA device, ten minutes; PYTHON=python3.12 takes that
#             one with what is installed there, and installs nothing
# make mutants SEED=1 DRAW=300   small edits of the code, each tried on the tests that should notice
#
# TORCH=cpu takes PyTorch's CPU build (a few hundred MB) where the default build for Linux would
# bring several GB of CUDA; TORCH=cu126, cu128, ... take another CUDA version.

PYTHON ?= python3
TORCH ?=
SEED ?= 1
DRAW ?= 300
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := models/smollm2-135m/config.json
TORCH_FROM := $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))
CONSTRAINTS := constraints.txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-color --constraint $(CONSTRAINTS)
TESTS :=
# Of what touches libraries, what takes seconds.
QUICK := -m "not slow and not fresh" tests/test_versions.py tests/test_private_names.py \
  $(addprefix tests/,san measure models data train ask evaluate merge plan runs)

.PHONY: demo test lowest docs gpu setup check pytest mutants clean

demo: setup
	@$(BIN)/python examples/demo.py

test: setup check pytest

lowest:
	$(MAKE) pytest VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt TESTS='$(QUICK)'

docs: setup
	$(BIN)/python scripts/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# A PYTHON that somebody names is used as it is.
ifeq ($(origin PYTHON),file)
gpu: setup
	$(BIN)/python benchmarks/gpu.py $(GPU)
else
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU)
endif

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d; try make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_FROM) torch
	$(PIP) --editable '.[dev]'
	@touch $(INSTALLED)

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

pytest: setup $(MODEL)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 15 $(TESTS)

mutants: setup
	$(PIP) --quiet --editable '.[mutants]'
	nice $(BIN)/python scripts/mutants.py --seed $(SEED) --draw $(DRAW)

$(MODEL): | setup
	$(BIN)/san-llm download smollm2-135m

clean:
	rm -rf $(VENV) .venv-lowest .pytest_cache .mypy_cache .ruff_cache .hypothesis
