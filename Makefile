# Everything works from a fresh clone with Python and a C++ compiler; the first target run builds the environment.
#   make demo        train a small model plainly and with 4-bit arithmetic, compare
#   make test        the test battery (8 minutes at most)
#   make test-long   the long tiers as well
#   make bench       the measured figures of the method cards
#   make lint        ruff, ruff format, mypy
#   make clean       remove what the above made
# PYTHON=python3.12 chooses the interpreter, VENV=/path an existing environment (its torch is kept).

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
# Processes that run the tests; 0 for none but pytest's own.
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.lightning-eff-installed
# torch spawns one thread per core in every process; tests and their ranks share the cores better with one each.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-long bench lint format install clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-long: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "long or not long" $(PYTEST_ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.peers setup
	env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks

lint: $(STAMP)
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/mypy || status=1; \
	exit $$status

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# torch first: a torch that is already there is kept, a machine without an NVIDIA driver gets the CPU build where its
# index can be reached, and everything else takes what pip finds.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -c "import torch" 2>/dev/null; then echo "keeping the torch of $(VENV)"; \
	elif [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 && $(BIN)/python -c \
	  "import urllib.request as u; u.urlopen('$(TORCH_CPU_INDEX)/torch/', timeout=10)" >/dev/null 2>&1; then \
	  $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --extra-index-url $(TORCH_CPU_INDEX) torch; \
	else $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch; fi
	@sed "s/^torch==.*/torch==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))')/" \
	  $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist demo_output .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage lightning_logs *.egg-info
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
