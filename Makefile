# Everything runs inside .venv, which these targets make. Only Python (3.10 or later) and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint bench clean

demo: $(VENV)/.installed  ## quantize the demo model, ask it something, and how to go on
	$(BIN)/python -m training.show_demo

test: $(VENV)/.installed-test lint  ## all checks but the slow ones
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.installed-test  ## minutes of work and gigabytes of disk
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-bench  ## the figures of bench/RESULTS.md
	$(BIN)/python -m bench.run_all $(or $(WORK),$(error WORK names a folder with 30 GB free for large files: make bench WORK=folder))

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[bench]'
	touch $@
