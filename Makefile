# Two commands: `make book` and `make test`. Each sets up what it needs; a second run is quick.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help book test audit notebooks serve preview lab bench record records setup clean

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PORT ?= 8000
DEVICE ?= cpu
BIN := .venv/bin
JOBS ?= auto
# Compiled modules are kept: without them every process would compile its imports anew, which costs seconds each.
unexport PYTHONDONTWRITEBYTECODE

help:  ## show these targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

book: .venv/.ready  ## execute the book and build the site in _build/html
	@$(BIN)/medarch build

test: .venv/.ready  ## every check that needs nothing but Python packages
	@$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check . && echo "ruff: clean"
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/medarch lint
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --nbval --nbval-cell-timeout 120 tests book

audit: book  ## the checks that need Chromium, Java and Node
	@$(BIN)/python tests/audit/audit.py _build/html

notebooks: .venv/.ready
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(if $(filter cuda,$(MEDARCH_DEVICE)),--nbval-lax,--nbval) --nbval-cell-timeout 120 book

serve: .venv/.ready  ## open the built book at http://127.0.0.1:8000/ (PORT=…)
	@$(BIN)/medarch serve --port $(PORT)

preview: .venv/.ready  ## CHAPTER=moe/architecture: its page, refreshed on each save
	@$(BIN)/medarch preview "$(CHAPTER)" --port $(PORT)

lab: .venv/.lab  ## open the chapters as notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=book

bench: .venv/.ready  ## NAME=moe/speed: measure on this machine and write the record (DEVICE=cuda on a GPU)
	@$(BIN)/medarch bench "$(NAME)" --device $(DEVICE)

record: .venv/.ready  ## CHAPTER=…: record a chapter's checked outputs anew and show the difference
	@$(BIN)/medarch record $(CHAPTER)

records: .venv/.ready  ## is every record measured with the code as it stands? (a release needs it)
	@$(BIN)/medarch records

setup: .venv/.ready

.venv/.ready: pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "This book needs Python 3.11 or newer, and none was found. Install one (https://www.python.org/downloads/), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"This book needs Python 3.11 or newer, and {sys.executable} is {v[0]}.{v[1]}. Name a newer one: make PYTHON=/path/to/python3.12")'
	@echo "Setting up .venv with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# PyTorch first, by itself: the CPU build from its own index, or, where that cannot be reached, from wherever pip finds it.
	@$(BIN)/python -c 'import torch' 2>/dev/null || PIP_RETRIES=0 $(BIN)/pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$$(grep '^torch==' requirements.lock)" 2> >(grep -v '^WARNING' >&2)
	@$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^uv==' requirements.lock)" 2> >(grep -v '^WARNING' >&2)
	@$(BIN)/uv pip install -q --python $(BIN)/python -c requirements.lock setuptools
	@$(BIN)/uv pip install -q --python $(BIN)/python -c requirements.lock --no-build-isolation -e '.[book,test,audit]'
	@touch $@

# JupyterLab opens chapters as notebooks, and neither asks for news nor looks for updates.
define LAB_SETTINGS
{"@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Jupytext Notebook", "myst": "Jupytext Notebook"}},
 "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}
endef
export LAB_SETTINGS

.venv/.lab: .venv/.ready
	@$(BIN)/uv pip install -q --python $(BIN)/python -c requirements.lock --no-build-isolation -e '.[book,test,audit,lab]'
	@mkdir -p .venv/share/jupyter/lab/settings && echo "$$LAB_SETTINGS" > .venv/share/jupyter/lab/settings/overrides.json
	@touch $@

clean:  ## remove what was built (the environment stays)
	@rm -rf _build
