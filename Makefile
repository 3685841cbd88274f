# Each target does its own set-up: `make demo` on a machine with nothing but Python >= 3.11 is enough.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup demo test lint lab export outputs clean docs readme

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"Python >= 3.11 is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12") if sys.version_info < (3, 11) else 0'
	@echo "Setting up $(VENV): minutes, and with CUDA's PyTorch about 7 GB, once"
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module: install your system's python3-venv package"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

setup: $(READY) ## make the virtual environment

demo: $(READY) ## train CPRFL on the embedded benchmark, beside its baselines (a few minutes)
	$(BIN)/cprfl_demo

lint: $(READY) ## style, types, and which module may import which
	$(BIN)/ruff check --quiet nbs tests cprfl
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint ## export up to date, notebooks clean and running, all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lab: $(READY) ## open JupyterLab on the notebooks
	@$(BIN)/nbdev_install_hooks 2>/dev/null || true # saved notebooks stay clean for git
	$(BIN)/jupyter lab --notebook-dir=nbs --LabApp.news_url=None nbs/index.ipynb

export: $(READY) ## notebooks to package: what to run after editing nbs/
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean

outputs: $(READY) ## run index, tutorials and analyses (after make demo), and keep their outputs
	$(BIN)/python tests/outputs.py nbs/index.ipynb nbs/tutorials/*.ipynb nbs/explanation/*.ipynb nbs/analysis/*.ipynb && $(BIN)/nbdev_clean

readme: $(READY) ## README.md from nbs/index.ipynb (no Quarto needed)
	$(BIN)/python tests/readme.py

docs: $(READY) ## render the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "Quarto is needed to render the site: https://quarto.org/docs/get-started"; exit 1; }
	$(BIN)/python tests/readme.py # newer than the index, or nbdev would write one of its own
	$(BIN)/nbdev_docs

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) _proc _docs build *.egg-info
