# Everything runs inside .venv, which these targets make. Only Python (3.10 or later) and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint coverage help bench clean

demo: $(VENV)/.installed  ## quantize the demo model, ask it something, and how to go on
	$(BIN)/python -m training.show_demo

test: $(VENV)/.installed-test lint  ## all checks but the slow ones
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.installed-test  ## minutes of work and gigabytes of disk
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

coverage: $(VENV)/.installed-test  ## which lines and branches the fast tests reach; also as htmlcov/index.html
	$(BIN)/python -m pytest -q --cov --cov-report=term --cov-report=html

help: $(VENV)/.installed-test  ## docs/help.md
	$(BIN)/python -m docs.make_help

bench: $(VENV)/.installed-bench  ## the figures of bench/RESULTS.md
	$(BIN)/python -m bench.run_all $(or $(WORK),$(error WORK names a folder with 30 GB free for large files: make bench WORK=folder))

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[all]'
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/python pyproject.toml .ci/constraints.txt
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[bench]'
	touch $@
