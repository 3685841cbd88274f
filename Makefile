# Each target does its own set-up: `make demo` on a machine with nothing but Python >= 3.11 is enough.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PYTEST := python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
LOWEST := .venv-lowest
AUDIT  := .venv-audit
# of torch before 2.11 and 2.13: files of torch.export and torch.jit.script, neither of which the kit uses
ACCEPTED := CVE-2026-4538 CVE-2025-3000

.PHONY: help setup demo test lowest audit lint lab export outputs clean docs readme

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
	VIRTUAL_ENV=$(abspath $(VENV)) OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

$(LOWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

lowest: $(LOWEST)/.ready ## all tests, with the lowest versions that pyproject.toml admits
	VIRTUAL_ENV=$(abspath $(LOWEST)) OMP_NUM_THREADS=1 $(LOWEST)/bin/$(PYTEST)

audit: $(READY) ## known vulnerabilities of what is installed
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit
	$(AUDIT)/bin/pip-audit --skip-editable $(ACCEPTED:%=--ignore-vuln %) \
	    --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

lab: $(READY) ## open JupyterLab on the notebooks
	@$(BIN)/nbdev_install_hooks 2>/dev/null || true # saved notebooks stay clean for git
	@$(BIN)/jupyter labextension disable @jupyterlab/apputils-extension:announcements 2>/dev/null # asks about news
	$(BIN)/jupyter lab --notebook-dir=nbs nbs/index.ipynb

export: $(READY) ## notebooks to package: what to run after editing nbs/
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean

outputs: $(READY) ## run index, tutorials and analyses (after make demo), and keep their outputs
	$(BIN)/python tests/outputs.py nbs/index.ipynb nbs/tutorials/*.ipynb nbs/explanation/*.ipynb nbs/analysis/*.ipynb && $(BIN)/python tests/living.py && $(BIN)/nbdev_clean

readme: $(READY) ## README.md from nbs/index.ipynb (no Quarto needed)
	$(BIN)/python tests/readme.py

docs: $(READY) ## render the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "Quarto is needed to render the site: https://quarto.org/docs/get-started"; exit 1; }
	$(BIN)/python tests/readme.py # newer than the index, or nbdev would write one of its own
	$(BIN)/nbdev_docs

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) $(LOWEST) $(AUDIT) _proc _docs build *.egg-info
