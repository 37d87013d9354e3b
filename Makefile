# Every target works from a clean clone: the first one that needs it makes the environment.
# Python 3.11 or newer.
PYTHON ?= python3
# The newest Python for which the lowest torch has wheels.
PYTHON_LOWEST ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CPSEG_DEMO ?= demo_out
LOWEST := .venv-lowest
BUILD := .venv-build
WHEEL := .venv-wheel

.PHONY: demo test test-all test-lowest fuzz check format lint types docs tutorials bench dist test-dist clean

demo: $(VENV)/.demo
	$(BIN)/cpseg demo -o $(CPSEG_DEMO)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

# With the slowest tests too: processes of torchrun, simulations, training runs of the examples.
# Continuous integration sets CI and leaves out those marked nightly.
test-all: $(VENV)/.dev
	CI=true NIGHTLY=true $(BIN)/python -m pytest -n 2 --dist worksteal -q

# The tests with the lowest versions that pyproject.toml allows, and without what only developers have.
test-lowest: $(LOWEST)/.done
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal

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

# Runs the tutorials' scripts and writes their notebooks, or those of NAMES.
tutorials: $(VENV)/.dev
	$(BIN)/python docs/tutorials/make.py $(NAMES)

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

# dist/ holds one version: what `twine upload dist/*` would send.
dist: $(BUILD)/.done
	rm -rf dist
	$(BUILD)/bin/python -m build --outdir dist .
	$(BUILD)/bin/twine check --strict dist/*

# The wheel as a user has it: installed in an environment without extras, away from the repository.
# The tests are those of the sdist, whose src is removed so that only the wheel can be imported.
DIST_TESTS ?= tests/core tests/groups tests/calibration tests/certification tests/files \
	tests/test_api.py tests/test_imports.py tests/laws/test_guarantee.py
test-dist: dist
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(WHEEL)/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls dist/*.whl)[test]"
	mkdir $(WHEEL)/sdist
	tar -xzf dist/*.tar.gz --strip-components=1 -C $(WHEEL)/sdist
	rm -r $(WHEEL)/sdist/src
	$(WHEEL)/bin/cpseg --version
	cd $(WHEEL)/sdist && ../bin/python -m pytest -n 2 $(DIST_TESTS)

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

$(LOWEST)/.done: constraints-lowest.txt pyproject.toml
	$(PYTHON_LOWEST) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt \
		--editable ".[completion,hf,report,test,trees]"
	touch $@

$(BUILD)/.done: constraints.txt
	$(PYTHON) -m venv $(BUILD)
	$(BUILD)/bin/python -m pip install --quiet --constraint constraints.txt build twine
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(BUILD) $(WHEEL) dist $(CPSEG_DEMO) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
