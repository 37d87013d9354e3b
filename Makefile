# Every target works from a clean clone: the first one that needs it makes the environment.
# Python 3.11 or newer for the pinned versions in constraints.txt; the package itself takes 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPSEG_DEMO ?= demo_out

.PHONY: demo test test-all fuzz check format lint types docs bench clean

demo: $(VENV)/.demo
	$(BIN)/cpseg demo -o $(CPSEG_DEMO)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -q

# With the slowest tests too: processes of torchrun, simulations, training runs of the examples.
# Continuous integration sets CI and leaves out those marked nightly.
test-all: $(VENV)/.dev
	CI=true NIGHTLY=true $(BIN)/python -m pytest -n 2 -q

# Random calls of every public function; the tests make 3,000 of them.
FUZZ_CALLS ?= 100000
fuzz: $(VENV)/.dev
	FUZZ_CALLS=$(FUZZ_CALLS) $(BIN)/python -m pytest -n 2 -q tests/laws/test_fuzz.py

check: format lint types test docs

format: $(VENV)/.dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --site-dir site

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

# torch alone and first: asked for by another package, a bare "torch" may bring another build.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,report,trees]"
	touch $@

# torchcp by itself: the tests compare with its scores, which need nothing of what it declares.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt torchcp
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) $(CPSEG_DEMO) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
