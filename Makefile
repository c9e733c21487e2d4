# The first target that needs it makes .venv; later calls only compare time stamps. A .venv that was made otherwise, such
# as by uv sync, is used if it has the packages, and never changed or deleted.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: help demo test test-all lint docs bench tables clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' $(firstword $(MAKEFILE_LIST))

demo: .venv/.installed ## train the grokking transformer with ARS2-Neo AGA
	@$(RUN) train.py fit --config configs/grok_aga.yaml

# One thread a process, because small networks gain nothing from more; idle processes take over tests of busy ones.
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: .venv/.installed ## run the tests
	@$(TEST)

test-all: .venv/.installed ## run the slow tests too, which take half an hour
	@$(TEST) -m ""

lint: .venv/.installed ## check style and types
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy

docs: .venv/.installed ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

bench: .venv/.installed ## measure the training loop, the optimizer's step and complete training steps
	@$(RUN) -m benchmarks.loop_overhead
	@$(RUN) -m benchmarks.optimizer_step
	@$(RUN) -m benchmarks.step_cost

MINUTES ?= 9
tables: .venv/.installed ## train the published tables on this machine's GPUs for MINUTES=9
	@$(RUN) -m studies.published_tables --minutes $(MINUTES)

clean: ## remove caches, and .venv if make created it; keep runs/
	@if $(MADE_HERE); then rm -rf .venv; elif [ -e .venv ]; then echo ".venv stays, for make has not made it"; fi
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# The range of requires-python in pyproject.toml, told before anything is downloaded.
define CHECK_PYTHON
import sys; version = sys.version_info[:2]; sys.exit(0 if (3, 11) <= version <= (3, 13) else \
"error: Python 3.11 to 3.13 is needed and $(PYTHON) is %d.%d; name another one, as in: make PYTHON=python3.12 demo" \
% version)
endef

INSTALL = $(RUN) -m pip install --no-input --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	>.venv/pip.log 2>&1 || { tail -n 20 .venv/pip.log >&2; \
	echo "error: the packages could not be installed; all of pip's output is in .venv/pip.log" >&2; exit 1; }; \
	mv .venv/.unfinished .venv/.installed

define CHECK_PACKAGES
import sys, tomllib; from importlib.metadata import version; \
from packaging.requirements import Requirement; \
has = lambda one: one.name == "ars2" or one.specifier.contains(version(one.name), prereleases=True); \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
[has(one) or sys.exit("it has %s %s, and %s is needed" % (one.name, version(one.name), one)) for one in map(Requirement, \
project["dependencies"] + sum(project["optional-dependencies"].values(), []))]
endef

MADE_HERE = [ -e .venv/.unfinished ] || { [ -e .venv/.installed ] && ! grep -q found .venv/.installed; }
# uv removes pip from an environment that it takes over.
TAKEN_OVER = [ ! -e .venv/.unfinished ] && $(RUN) -c "" 2>/dev/null && ! $(RUN) -m pip --version >/dev/null 2>&1

# An install that was cut short leaves .venv/.unfinished behind, and the next call starts from nothing.
.venv/.installed: pyproject.toml constraints.txt
	@if [ -d .venv ] && [ ! -L .venv ]; then rmdir .venv 2>/dev/null || true; fi
	@set -e; if [ -e .venv ] && { ! { $(MADE_HERE); } || { $(TAKEN_OVER); }; }; then \
		said=$$($(RUN) -c '$(CHECK_PACKAGES)' 2>&1) || { echo "error: make has not made .venv and cannot use it" \
			"($$(echo "$$said" | tail -n 1)); bring it up to date (uv sync, or pip install -e '.[dev]' in it)," \
			"or move it away" >&2; exit 1; }; \
		echo "using .venv as it was found"; \
		echo found >$@ || true; \
	elif [ -e .venv/.unfinished ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
		command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found; install Python 3.11 to 3.13" \
			"or name it, as in: make PYTHON=python3.12 demo" >&2; exit 1; }; \
		$(PYTHON) -c '$(CHECK_PYTHON)'; \
		echo "setting up .venv (a few minutes, once; .venv/pip.log shows how far it is)"; \
		rm -rf .venv; mkdir .venv; touch .venv/.unfinished; \
		$(PYTHON) -m venv .venv; \
		$(INSTALL); \
	else \
		echo "bringing .venv up to date"; \
		touch .venv/.unfinished; \
		$(INSTALL); \
	fi
