# The first target that needs it makes .venv; later calls only compare time stamps.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: help demo test test-all lint bench tables clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' $(firstword $(MAKEFILE_LIST))

demo: .venv/.installed ## train the grokking transformer with ARS2-Neo AGA
	@$(RUN) train.py fit --config configs/grok_aga.yaml

# A file of tests a process, one thread each: small networks gain nothing from more.
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test: .venv/.installed ## run the tests
	@$(TEST)

test-all: .venv/.installed ## run the slow tests too: four processes, twenty kills
	@$(TEST) -m ""

lint: .venv/.installed ## check style and types
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy

bench: .venv/.installed ## measure the training loop, the optimizer's step and the whole step
	@$(RUN) -m benchmarks.loop_overhead
	@$(RUN) -m benchmarks.optimizer_step
	@$(RUN) -m benchmarks.step_cost

MINUTES ?= 9
tables: .venv/.installed ## train the published tables on this machine's GPUs, as far as MINUTES=9 allow
	@$(RUN) -m studies.published_tables --minutes $(MINUTES)

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# The range of requires-python in pyproject.toml, told before anything is downloaded.
define CHECK_PYTHON
import sys; version = sys.version_info[:2]; sys.exit(0 if (3, 11) <= version <= (3, 13) else \
"error: Python 3.11 to 3.13 is needed and $(PYTHON) is %d.%d; name another one, as in: make PYTHON=python3.12 demo" \
% version)
endef

# An install that was cut short leaves .venv/.unfinished behind, and the next call starts from nothing.
.venv/.installed: pyproject.toml constraints.txt
	@set -e; if [ -e .venv/.unfinished ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
		command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found; install Python 3.11 to 3.13" \
			"or name it, as in: make PYTHON=python3.12 demo" >&2; exit 1; }; \
		$(PYTHON) -c '$(CHECK_PYTHON)'; \
		echo "setting up .venv (a few minutes, once; .venv/pip.log shows how far it is)"; \
		rm -rf .venv; mkdir .venv; touch .venv/.unfinished; \
		$(PYTHON) -m venv .venv; \
	else \
		echo "bringing .venv up to date"; \
	fi
	@touch .venv/.unfinished
	@$(RUN) -m pip install --no-input --disable-pip-version-check -c constraints.txt -e '.[dev]' \
		>.venv/pip.log 2>&1 || { tail -n 20 .venv/pip.log >&2; \
		echo "error: the packages could not be installed; all of pip's output is in .venv/pip.log" >&2; exit 1; }
	@mv .venv/.unfinished $@
