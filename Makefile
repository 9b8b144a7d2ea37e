PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip --disable-pip-version-check
# Tests of a file stay together, as they share what is dear to make; files go out in order, the longest of them first.
JOBS ?= 2
SOURCES = engines training service fewstep.py tests benchmarks

.DEFAULT_GOAL := help

.PHONY: help serve test nightly check format lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/serving ## Install what serving needs (no torch) and serve the bundle that ships
	$(VENV)/bin/fewstep serve $(ARGS)

test: $(VENV)/development ## Install the rest and run the tests
	$(VENV)/bin/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

nightly: $(VENV)/development ## Run every test, those that take minutes too
	$(VENV)/bin/pytest -m "slow or not slow" $(ARGS)

check: $(VENV)/development ## Format, lint, types, import contract
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/development ## Format the code and fix what the linter can fix
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

lock: $(VENV)/bin/python ## Write requirements.lock anew: the versions that a fresh install takes today
	$(PIP) install -q --dry-run --ignore-installed --report build-lock.json -e '.[training,dev]' 'torch==2.13.0'
	$(VENV)/bin/python -c "import json; \
	  names = [i['metadata'] for i in json.load(open('build-lock.json'))['install']]; \
	  print(*sorted(n['name'].lower() + '==' + n['version'].split('+')[0] for n in names if n['name'] != 'fewstep'), sep='\n')" \
	  > requirements.lock
	rm build-lock.json

clean: ## Remove the environment and what tools left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/serving: $(VENV)/bin/python pyproject.toml requirements.lock
	$(PIP) install -q -c requirements.lock -e .
	touch $@

# torch-fidelity comes without torchvision, whose build for CUDA breaks all that imports it beside a torch for the CPU.
$(VENV)/development: $(VENV)/bin/python pyproject.toml requirements.lock
	$(PIP) install -q -c requirements.lock -e '.[training,dev]'
	$(PIP) install -q --no-deps torch-fidelity==0.3.0
	touch $@ $(VENV)/serving
