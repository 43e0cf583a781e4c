# jigsaw-pretrain: `make` lists the targets. Every variable below can be given on the command line.

# Whether a variable was given, on the command line or by the environment, where OUT or RUN may stand from elsewhere.
given = $(filter command% environment%,$(origin $1))
# make's own functions part words at spaces, which a path may have.
exists = $(shell test -e "$1" && echo yes)
EMPTY :=
place = $(abspath $(subst $(EMPTY) $(EMPTY),|,$1))

ANNOTATIONS ?=
IMAGES ?=
OUT ?= .
# The sample's are for the sample; data of your own has the recipes that prep fitted to it.
OWN := $(strip $(ANNOTATIONS)$(call given,OUT)$(if $(wildcard .sample/prepped),,$(call exists,$(OUT)/manifests/dataset.json)))
RECIPE ?= $(if $(OWN),$(OUT)/recipe.toml,recipes/sample.toml)
# Of your own data never runs/sample, which `make clean` removes.
RUN ?= runs/$(if $(call given,RECIPE),$(basename $(notdir $(RECIPE))),$(if $(OWN),mine,sample))
GPUS ?= 1
WORKERS ?= 2
SEED ?= 0
FILE ?= $(RUN)-torchvision.pth
# Of YOLO and VOC folders that state their splits: SPLIT=train VAL_SPLIT=val, both of the same folder where no other is given.
SPLIT ?=
VAL_SPLIT ?=
VAL_ANNOTATIONS ?= $(if $(VAL_SPLIT),$(ANNOTATIONS))
VAL_IMAGES ?= $(if $(VAL_SPLIT),$(IMAGES))
INIT ?= $(RUN)
DETECTOR ?= $(RUN)-detector
DETECT_RECIPE ?= $(if $(OWN),$(OUT)/detect.toml,recipes/detect-sample.toml)
COMPARISON ?= $(RUN)-comparison
ARMS ?= scratch,jigsaw

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SAMPLE := .sample
HELD_OUT := .sample-held-out
READY := $(VENV)/.ready
# Imported once, so that their bytecode is on disk: uv writes none, and where Python is told to write none either, every
# process would compile torch again, ten seconds each.
COMPILED := jigsaw_pretrain.train.commands.pretrain, jigsaw_pretrain.detect.commands.compare, torch.distributed.run, timm, s3fs, moto.server, hypothesis
# torchrun, without its own traceback below the line of a rank that was stopped or refused something.
TORCHRUN := $(BIN)/python -m jigsaw_pretrain.train.engine.launch
SEVERAL := $(filter-out 0 1,$(GPUS))
LAUNCH := $(if $(SEVERAL),$(TORCHRUN) --standalone --nproc-per-node $(GPUS) -m train --,$(BIN)/python -m train)
DEVICE := $(if $(SEVERAL), --device cuda)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help gpus recipes no-sample no-validation venv lock shards pretrain evaluate preview export detect compare test test-fast soak lint docs docs-reference bench clean

help:  ## list the targets
	@echo "make TARGET [VARIABLE=value ...]"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'
	@echo
	@echo "variables: $(KNOWN)"
	@echo "a sample dataset is drawn where none of ANNOTATIONS, IMAGES, OUT, RUN and RECIPE is given; data of your own is"
	@echo "trained on by the recipe that prep fits to it, OUT/recipe.toml, which you may change"
	@echo "RUN is $(RUN), RECIPE is $(RECIPE), OUT is $(OUT)"

venv: $(READY)  ## make .venv and install the locked versions into it

$(READY): pyproject.toml setup.py requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jigsaw-pretrain needs Python 3.11 or newer; this is %s. Name another one: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --constraint requirements.lock --build-constraint requirements.lock --editable '.[dev]'
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import $(COMPILED)'
	@touch $@

lock: $(READY)  ## renew requirements.lock from pyproject.toml's ranges
	echo uv > $(VENV)/extra.in
	$(BIN)/uv pip compile --quiet --upgrade --all-extras --no-header --no-annotate --output-file requirements.lock pyproject.toml $(VENV)/extra.in

AGAIN := $(if $(MAKEOVERRIDES), $(MAKEOVERRIDES))

# What is given must be a variable of this file: a typo would train on the sample dataset.
KNOWN := ANNOTATIONS IMAGES OUT RUN RECIPE GPUS WORKERS SEED FILE VAL_ANNOTATIONS VAL_IMAGES SPLIT VAL_SPLIT INIT DETECTOR \
	DETECT_RECIPE COMPARISON ARMS VENV PYTHON BENCH_SOURCE BENCH_DATA
STRANGE := $(firstword $(foreach name,$(filter-out $(KNOWN) MAKEFLAGS MFLAGS MAKEOVERRIDES,$(.VARIABLES)),$(if $(filter command%,$(origin $(name))),$(name))))
NEAR = $(shell $(PYTHON) -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1))' $(STRANGE) $(KNOWN))
$(if $(STRANGE),$(error there is no variable $(STRANGE) here$(if $(NEAR),. Type: make $(MAKECMDGOALS) $(NEAR)=$($(STRANGE)),. The variables are: $(KNOWN))))
$(if $(and $(OWN),$(call given,RUN),$(filter $(call place,runs/sample),$(call place,$(RUN)))),$(error RUN=$(RUN) is the sample's, which `make clean` removes. Name another one: make $(MAKECMDGOALS) RUN=runs/mine))
$(if $(filter $(call place,$(RUN)) $(call place,$(RUN))/%,$(call place,$(FILE))),$(error FILE=$(FILE) lies in the run $(RUN), whose files it could overwrite. Name another one: make $(MAKECMDGOALS) RUN=$(RUN) FILE=backbone.pth))
$(if $(strip $(IMAGES)),$(if $(strip $(ANNOTATIONS)),,$(error IMAGES is given without ANNOTATIONS: name the annotations too, make $(firstword $(MAKECMDGOALS)) ANNOTATIONS=FILE IMAGES=$(IMAGES))))
$(if $(strip $(VAL_IMAGES)),$(if $(strip $(VAL_ANNOTATIONS)),,$(error VAL_IMAGES is given without VAL_ANNOTATIONS: name both)))
$(if $(strip $(VAL_ANNOTATIONS)),$(if $(strip $(VAL_IMAGES)),,$(error VAL_ANNOTATIONS is given without VAL_IMAGES: name both)))
$(if $(strip $(ANNOTATIONS)),$(if $(strip $(IMAGES)),,$(error ANNOTATIONS is given without IMAGES: name the image folder too, make $(firstword $(MAKECMDGOALS)) ANNOTATIONS=$(ANNOTATIONS) IMAGES=DIR)))
$(foreach name,SPLIT VAL_SPLIT,$(if $(strip $($(name))),$(if $(strip $(ANNOTATIONS)$(VAL_ANNOTATIONS)),,$(error $(name)=$($(name)) is given without ANNOTATIONS: name them and the image folder too, make $(firstword $(MAKECMDGOALS)) ANNOTATIONS=FILE IMAGES=DIR $(name)=$($(name)), or leave $(name) out))))
# Images of every split would be trained on, those to judge by among them.
$(if $(and $(VAL_SPLIT),$(ANNOTATIONS),$(filter $(call place,$(ANNOTATIONS)),$(call place,$(VAL_ANNOTATIONS)))),$(if $(strip $(SPLIT)),,$(error VAL_SPLIT=$(VAL_SPLIT) is given without SPLIT, so its images would be trained on too. Name the split to train on: make $(MAKECMDGOALS)$(AGAIN) SPLIT=NAME)))

# What can be typed next, with what was given; the commands leave it to this file.
shards pretrain evaluate preview export detect compare: export JIGSAW_NEXT := make
NAMED := $(strip $(foreach name,OUT RUN RECIPE,$(if $(call given,$(name)),$(name))))
SAMPLED := $(if $(strip $(ANNOTATIONS)$(NAMED)),,yes)
HELD_OUT_BY := $(if $(and $(SPLIT),$(ANNOTATIONS)),VAL_SPLIT=NAME,VAL_ANNOTATIONS=FILE VAL_IMAGES=DIR)
UNSEEN := $(if $(strip $(VAL_ANNOTATIONS)$(SAMPLED)),, $(HELD_OUT_BY))
TRAINED := $(if $(strip $(ANNOTATIONS)$(SAMPLED)),, ANNOTATIONS=FILE IMAGES=DIR)
next = @echo "next, whichever you like:" >&2; for line in $1; do printf '  make %s\n' "$$line" >&2; done

# What to prep: the user's annotations, or the sample dataset, which is drawn first. It is a toy, so it is for those who
# name nothing: whoever names a place, a run or a recipe means data of their own.
ifeq ($(strip $(ANNOTATIONS)),)
SOURCE_ANNOTATIONS := $(SAMPLE)/annotations.json
SOURCE_IMAGES := $(SAMPLE)/images
DRAWN := $(if $(NAMED),no-sample,$(SAMPLE)/annotations.json)
else
SOURCE_ANNOTATIONS := $(ANNOTATIONS)
SOURCE_IMAGES := $(IMAGES)
DRAWN :=
endif

# Prep before training where it is ours to do: annotations were named, or a local OUT holds no finished dataset yet.
PREPPED := $(if $(strip $(ANNOTATIONS)),,$(if $(findstring ://,$(OUT)),remote,$(call exists,$(OUT)/manifests/dataset.json)))

no-sample:
	@echo "make: $(NAMED) is given without ANNOTATIONS, so the sample dataset is not drawn. Name yours:" >&2
	@echo "  make $(or $(firstword $(MAKECMDGOALS)),shards) ANNOTATIONS=FILE IMAGES=DIR$(foreach name,$(NAMED), $(name)=$($(name)))" >&2
	@exit 2

$(SAMPLE)/annotations.json: | $(READY)
	$(BIN)/python -m prep sample-data --out $(SAMPLE) --images 240 --seed 0

$(HELD_OUT)/annotations.json: | $(READY)
	$(BIN)/python -m prep sample-data --out $(HELD_OUT) --images 120 --seed 1

shards: $(DRAWN) | $(READY)  ## annotations and images -> OUT/shards and OUT/manifests (resumes what was begun)
	$(BIN)/python -m prep shards --annotations "$(SOURCE_ANNOTATIONS)" --images "$(SOURCE_IMAGES)" \
		$(if $(SPLIT),--split "$(SPLIT)" )--out "$(OUT)" --seed $(SEED) --workers $(WORKERS)$(if $(filter $(OUT)/recipe.toml,$(RECIPE)),, --recipe "$(RECIPE)")
	$(BIN)/python -m prep report --out "$(OUT)"
	@$(if $(filter $(SAMPLE)/%,$(DRAWN)),touch,rm -f) $(SAMPLE)/prepped
	$(if $(filter shards,$(MAKECMDGOALS)),$(call next,"preview$(AGAIN)" "pretrain$(AGAIN)"))

# Processes without a GPU each would share the cores and be no faster.
gpus: | $(READY)
	@$(BIN)/python -c 'import sys, torch; found = torch.cuda.device_count(); sys.exit(found < $(GPUS) and "make: GPUS=$(GPUS), and this machine shows %d. Type: make $(MAKECMDGOALS) GPUS=%d, or leave GPUS out" % (found, max(1, found)))'

# A dataset of an earlier version has no recipe yet.
UNFITTED := $(if $(filter $(OUT)/recipe.toml,$(RECIPE)),$(if $(findstring ://,$(OUT))$(call exists,$(RECIPE)),,recipes))

recipes: | $(READY)
	$(BIN)/python -m prep finish --out "$(OUT)" --max-skipped 100%

pretrain: $(if $(SEVERAL),gpus) $(if $(PREPPED),$(UNFITTED),shards) | $(READY)  ## shards -> RUN/backbone.pth (resumes what was begun)
	$(LAUNCH) pretrain --data "$(OUT)" --run "$(RUN)" --recipe "$(RECIPE)" --workers $(WORKERS)$(DEVICE) --resume
	$(if $(filter pretrain,$(MAKECMDGOALS)),$(call next,"evaluate$(AGAIN)$(UNSEEN)" "export$(AGAIN)" "detect$(AGAIN)$(TRAINED)$(UNSEEN)"))

# What a run and a detector are judged on: the user's validation set, or else sample images drawn with another seed.
ifneq ($(strip $(VAL_ANNOTATIONS)),)
JUDGED := --val-annotations "$(VAL_ANNOTATIONS)" --val-images "$(VAL_IMAGES)"$(if $(VAL_SPLIT), --val-split "$(VAL_SPLIT)")
HELD_SPLIT := $(if $(VAL_SPLIT),--split "$(VAL_SPLIT)" )
HELD_ANNOTATIONS := $(VAL_ANNOTATIONS)
HELD_IMAGES := $(VAL_IMAGES)
HELD_DATA := $(RUN)-validation
HELD :=
else ifneq ($(strip $(ANNOTATIONS)$(NAMED)),)
JUDGED :=
HELD := no-validation
else
JUDGED := --val-annotations $(HELD_OUT)/annotations.json --val-images $(HELD_OUT)/images
HELD_ANNOTATIONS := $(HELD_OUT)/annotations.json
HELD_IMAGES := $(HELD_OUT)/images
HELD_DATA := $(HELD_OUT)
HELD := $(HELD_OUT)/annotations.json
endif

no-validation:
	@echo "make: $(MAKECMDGOALS) of your own data needs images that RUN was not trained on. Name them:" >&2
	@echo "  make $(MAKECMDGOALS) $(strip $(HELD_OUT_BY) $(foreach name,ANNOTATIONS IMAGES SPLIT $(NAMED),$(if $($(name)),$(name)=$($(name)))))" >&2
	@exit 2

evaluate: $(HELD) | $(READY)  ## accuracy of RUN on images it has never seen: VAL_ANNOTATIONS, VAL_IMAGES
	$(BIN)/python -m prep shards --annotations "$(HELD_ANNOTATIONS)" --images "$(HELD_IMAGES)" $(HELD_SPLIT)--out "$(HELD_DATA)"
	$(BIN)/python -m train evaluate --run "$(RUN)" --data "$(HELD_DATA)"
	$(call next,"export$(AGAIN)" "detect$(AGAIN)$(TRAINED)$(UNSEEN)")

preview: $(if $(PREPPED),$(UNFITTED),shards) | $(READY)  ## a sheet of jigsaws as the trainer sees them -> preview.png
	$(BIN)/python -m train preview --data "$(OUT)" --recipe "$(RECIPE)" --out preview.png --count 16
	$(call next,"pretrain$(AGAIN)")

export: | $(READY)  ## RUN's newest weights -> FILE, under torchvision's names
	$(BIN)/python -m train export --run "$(RUN)" --to torchvision --out "$(FILE)"
	$(call next,"detect$(AGAIN)$(TRAINED)$(UNSEEN)")

TRAINED_ON := --annotations "$(SOURCE_ANNOTATIONS)" --images "$(SOURCE_IMAGES)" $(if $(SPLIT),--split "$(SPLIT)" )$(JUDGED)

# The -- keeps torchrun from taking --run for an abbreviation of its own --run-path.
DETECT := $(if $(SEVERAL),$(TORCHRUN) --standalone --nproc-per-node $(GPUS) -m -- detect,$(BIN)/python -m detect)

detect: $(if $(SEVERAL),gpus) $(DRAWN) $(filter-out no-validation,$(HELD)) $(if $(call exists,$(INIT)/backbone.pth)$(filter-out $(call place,$(RUN)),$(call place,$(INIT))),,pretrain) | $(READY)  ## RUN's backbone (or INIT) -> a detector and its AP, in DETECTOR
	$(DETECT) train $(TRAINED_ON) --run "$(DETECTOR)" --init "$(INIT)" --recipe "$(DETECT_RECIPE)" --workers $(WORKERS)$(DEVICE) --resume
	$(call next,"compare$(AGAIN)$(TRAINED)$(UNSEEN)")

compare: $(if $(SEVERAL),gpus) $(DRAWN) $(HELD) $(if $(PREPPED),,shards) | $(READY)  ## does the pre-training pay? ARMS over three seeds -> COMPARISON
	$(BIN)/python -m detect compare $(TRAINED_ON) --data "$(OUT)" --out "$(COMPARISON)" --arms $(ARMS) --seeds 3 \
		$(if $(call given,DETECT_RECIPE)$(OWN),,--rates 0.08,0.16,0.32 )--recipe "$(DETECT_RECIPE)" --pretrain-recipe "$(RECIPE)" --workers $(WORKERS) --gpus $(GPUS)$(DEVICE)

# Files go to three processes in the order that tests/conftest.py gives them; xdist's own would be by number of tests.
# After a process that died xdist may wait for ever, so that ends it.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: | $(READY)  ## the tests, seven to eight minutes on two cores
	$(PYTEST)

test-fast: | $(READY)  ## the tests that are not marked slow: about a minute on two cores
	$(PYTEST) -m "not slow"

soak: | $(READY)  ## the long series: hundreds of kills, thousands of fuzz cases (an hour or more)
	JIGSAW_SOAK=1 $(PYTEST)

# As installed, the stages lie inside jigsaw_pretrain/. mypy and import-linter read folders, so they get one made of links;
# without it they would see nothing but jigsaw_pretrain/ itself, and find no fault (tests/test_lint.py).
VIEW := build/view

view:
	@rm -rf $(VIEW) && mkdir -p $(VIEW)/jigsaw_pretrain
	@ln -s $(addprefix ../../../,formats prep train detect $(filter-out %__pycache__,$(wildcard jigsaw_pretrain/*))) $(VIEW)/jigsaw_pretrain/
	@ln -s ../../bench ../../tests ../../pyproject.toml $(VIEW)/

lint: view | $(READY)  ## ruff (lint and format), mypy, and the directions of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VIEW) && "$(abspath $(BIN))/python" -m mypy --cache-dir ../../.mypy_cache -p jigsaw_pretrain -p bench -p tests
	cd $(VIEW) && "$(abspath $(BIN))/lint-imports" --cache-dir ../../.import_linter_cache

docs-reference: | $(READY)  ## docs/recipes.md from the docstrings of the recipes' keys
	$(BIN)/python docs/recipes.py

docs: view | $(READY)  ## the documentation as a site in build/site; nothing is fetched but the tools, once
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --constraint requirements.lock --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What `make bench` runs, one after the other; bench/quality.py trains detectors and is called by hand. bench/prep.py is
# given a folder with annotations.json and images/ (BENCH_SOURCE), the others a prepped dataset (BENCH_DATA); without
# them each draws its own.
BENCHES := prep load stream train blocked scaling estimate
BENCH_SOURCE ?=
BENCH_DATA ?=
GIVEN = $(if $(filter prep,$1),$(if $(BENCH_SOURCE),--data "$(BENCH_SOURCE)"),$(if $(BENCH_DATA),--data "$(BENCH_DATA)"))

bench: | $(READY)  ## side-by-side measurements -> tables with goals, and JSON under bench/results (half an hour)
	@failed=; $(foreach name,$(BENCHES),echo "== bench/$(name).py"; \
		$(BIN)/python bench/$(name).py $(call GIVEN,$(name)) || failed="$$failed $(name)";) \
	$(BIN)/python bench/summary.py; \
	if [ -n "$$failed" ]; then echo "these ended with an error:$$failed"; exit 1; fi

# What the targets above write for the sample; another runs/sample-NAME is somebody's own.
SAMPLES := -validation -detector -comparison -torchvision.pth -torchvision.pth.README.md

clean:  ## remove the sample, its shards and its runs; data and runs of your own stay, and so does the environment
	$(if $(wildcard $(SAMPLE)/prepped),find shards manifests -mindepth 1 -not -name README.md -delete && rm -f recipe.toml detect.toml report.html)
	rm -rf $(SAMPLE) $(HELD_OUT) runs/sample $(addprefix runs/sample,$(SAMPLES)) preview.png bench/results build/site
