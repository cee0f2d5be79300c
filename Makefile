# lorakit: `make` lists what there is.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow check format schema clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

setup: $(VENV)/.ready ## Make .venv with the tested set of packages (constraints.txt)

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "lorakit needs Python 3.11: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo 'setting up $(VENV): a minute or two, depending on the network'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt --config-settings editable_mode=compat
	@touch $@

# These models are tiny: one thread is as fast as two that wait for each other, and faster when others work too.
quickstart test test-slow: export OMP_NUM_THREADS := 1

# Each verb is what a user types. A finished run and a merged model are left alone, so that it can be called again.
RUN := runs/quickstart
quickstart: setup ## Train, merge and compare a tiny model: what lorakit does, in about a minute
	$(BIN)/lorakit train recipes/quickstart/recipe.yaml --output $(RUN) --resume auto
	@test -d $(RUN)/merged || $(BIN)/lorakit merge $(RUN) --output $(RUN)/merged
	@echo
	@$(BIN)/lorakit generate $(RUN) --compare -p 'Greta left 7 lemons for Ada at the mill on Friday.'
	@echo
	@$(BIN)/lorakit eval $(RUN) --exact-match
	@echo
	@$(BIN)/lorakit count-params $(RUN)
	@echo
	@echo 'what was trained   $(RUN)/adapter (PEFT format), $(RUN)/params.md, $(RUN)/metrics.jsonl'
	@echo 'the merged model   $(RUN)/merged'
	@echo 'what to type next  source $(VENV)/bin/activate'
	@echo '                   lorakit chat $(RUN)'
	@echo '                   lorakit recipes list'

test: setup ## Set up, then run the tests (no GPU, no model hub)
	$(BIN)/python -m pytest -m "not slow" -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup ## The tests that take long
	$(BIN)/python -m pytest -m slow -q

check: setup ## Lint, format, types, import rules and budgets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: setup ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: setup ## Write recipes/recipe.schema.json anew, after a change of the grammar
	$(BIN)/lorakit schema > recipes/recipe.schema.json

clean: ## Remove .venv and what was built
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
