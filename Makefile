# jigsaw-pretrain: `make` lists the targets. Every variable below can be given on the command line.

ANNOTATIONS ?=
IMAGES ?=
OUT ?= .
RUN ?= runs/$(basename $(notdir $(RECIPE)))
RECIPE ?= recipes/sample.toml
GPUS ?= 1
WORKERS ?= 2
SEED ?= 0
FILE ?= $(RUN)/backbone.pth

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SAMPLE := .sample
READY := $(VENV)/.ready
LAUNCH := $(if $(filter-out 0 1,$(GPUS)),$(BIN)/torchrun --standalone --nproc-per-node $(GPUS) -m train,$(BIN)/python -m train)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv lock shards pretrain preview export test soak lint bench clean

help:  ## list the targets
	@echo "make TARGET [VARIABLE=value ...]"
	@echo
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  \1|\2/' | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'
	@echo
	@echo "variables: ANNOTATIONS IMAGES OUT RUN RECIPE GPUS WORKERS SEED FILE"
	@echo "without ANNOTATIONS a sample dataset is drawn; RUN is $(RUN), RECIPE is $(RECIPE), OUT is $(OUT)"

venv: $(READY)  ## make .venv and install the locked versions into it

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jigsaw-pretrain needs Python 3.11 or newer; this is %s. Name another one: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --constraint requirements.lock --build-constraint requirements.lock --editable '.[dev]'
	@touch $@

lock: $(READY)  ## renew requirements.lock from pyproject.toml's ranges
	echo uv > $(VENV)/extra.in
	$(BIN)/uv pip compile --quiet --upgrade --all-extras --no-header --no-annotate --output-file requirements.lock pyproject.toml $(VENV)/extra.in

$(SAMPLE)/annotations.json: | $(READY)
	$(BIN)/python -m prep sample-data --out $(SAMPLE) --images 240 --seed 0

