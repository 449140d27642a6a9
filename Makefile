# make reproduce   run every notebook, write executed copies and reports/report.html  [MODEL= TEMPLATE= PROMPT= QUERIES= HELDOUT= GUARD= OUT= JOBS=]
# make check       formatting, lint, types, import contract, habits and the fast tests: under a minute
# make test        set-up, formatting, lint, types, tests, notebooks against their stored outputs
# make lab         JupyterLab on notebooks/
# make setup       the environment alone, in .venv  [PYTHON=python3.12]
# make notebooks   execute the notebooks in place and store clean outputs  [NOTEBOOKS=...]
# make bench       the speed and memory figures
# make docs        the documentation's pages and the API reference, in docs/_build/html
# make clean       remove reports and caches; the environment stays

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup reproduce lint check test test-notebooks notebooks lab bench docs clean

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
NOTEBOOKS ?= $(wildcard notebooks/[0-9][0-9]_*.ipynb)
OUT ?= reports
SITE ?= docs/_build/html
SKIPPED := .pytest_cache/skipped

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(STAMP)
ifneq ($(origin PYTHON),file)
	@asked=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	$(RUN) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "'$$asked'")' || \
	{ echo "$(VENV) was made with another Python than $(PYTHON) ($$asked): remove the folder $(VENV) and run make setup again"; exit 1; }
endif

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Python 3.11 or later is needed, and $(PYTHON) is not: install it, then make setup PYTHON=python3.11"; exit 1; }
	$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet -r requirements.lock
	$(RUN) -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

# One word of the shell, as the user wrote it: neither make nor the shell expands a name.
quoted = '$(subst ','\'',$(value 1))'
given = $(if $(value $(2)),$(1) '$(subst ','\'',$(value $(2)))')
unexport MODEL TEMPLATE PROMPT QUERIES HELDOUT GUARD OUT JOBS

reproduce: setup
	$(RUN) -m analysis_lib reproduce $(call given,--model,MODEL) $(call given,--template,TEMPLATE) $(call given,--prompt,PROMPT) \
		$(call given,--queries,QUERIES) $(foreach set,$(value HELDOUT),--heldout $(call quoted,$(set))) $(call given,--guard,GUARD) \
		$(call given,--jobs,JOBS) $(call given,--out,OUT)

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy analysis_lib
	$(RUN) -m tools.measure

# What needs no model, and the examples of the rooms that need none.
FAST := $(addprefix tests/test_,alpaca benchmark comparison data imports judge legal published setup space string_judge wrappers)
check: lint
	$(RUN) -m pytest -q -n 2 --dist=loadfile $(wildcard $(FAST:=.py))

test: lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest -q -n 2 --dist=loadfile --doctest-modules analysis_lib
	$(RUN) -m pytest -n 2 --dist=loadfile --no-loadscope-reorder --skipped-to=$(SKIPPED) tests
	$(MAKE) test-notebooks
	@cat $(SKIPPED)

# First with an empty store: every number is computed again, none is read back. Then with the store that this left, in kernels that
# cannot load weights: the same outputs, from what was kept. --dist=loadfile keeps a notebook's cells in one kernel. The notebooks that
# train go first, side by side; 06 comes after 05 and finds its soft prompt.
FIRST := notebooks/05% notebooks/09% notebooks/06%
test-notebooks: setup
	@test -n "$(NOTEBOOKS)" || { echo "No notebooks NN_*.ipynb in notebooks/: nothing to compare"; exit 1; }
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	unset ANALYSIS_LIB_DEVICE ANALYSIS_LIB_DTYPE; export OMP_WAIT_POLICY=PASSIVE ANALYSIS_LIB_STORE="$$folder/store" OMP_NUM_THREADS=1 PLOTLY_RENDERER=plotly_mimetype TQDM_DISABLE=1; \
	compare="$(RUN) -m pytest -p tests.nbval_plugin --nbval --nbval-current-env --nbval-cell-timeout=600 -n 2 --dist=loadfile --no-loadscope-reorder"; \
	notebooks=($(foreach one,$(FIRST),$(filter $(one),$(NOTEBOOKS))) $(filter-out $(FIRST),$(NOTEBOOKS))); \
	$$compare "$${notebooks[@]}"; \
	mkdir -p "$$folder/ipython/profile_default/startup"; \
	cp tests/no_weights.py "$$folder/ipython/profile_default/startup"; \
	IPYTHONDIR="$$folder/ipython" $$compare "$${notebooks[@]}"

notebooks: setup
	OMP_NUM_THREADS=1 $(RUN) -m tools.store_outputs $(if $(filter command line environment,$(origin NOTEBOOKS)),$(NOTEBOOKS))

lab: setup
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m jupyterlab --notebook-dir=notebooks

bench: setup
	$(RUN) -m bench

docs: setup
	$(RUN) -m sphinx -W --keep-going -qaE docs '$(SITE)'
	@echo "Documentation: $(SITE)/index.html"

clean:
	rm -rf reports docs/_build docs/api .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
