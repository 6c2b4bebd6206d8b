# Everything runs inside .venv, which these targets make. Only Python (3.10 or later) and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint coverage fuzz docs site bench clean

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

models/demo.safetensors: $(VENV)/.installed $(wildcard quantize/edgemistral_quantize/*.py)  ## the demo model's blob, again
	$(BIN)/edgemistral quantize models/demo $@ --calibrate none --force

fuzz: $(VENV)/.installed-test  ## hostile inputs at every border: make fuzz MINUTES=10
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10) --record

docs: $(VENV)/.installed-test  ## docs/help.md, after an option has changed
	$(BIN)/python -m docs.make_help

site: $(VENV)/.installed-docs  ## the documents as web pages, in site/; broken links are errors
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-bench $(VENV)-avx2/.installed  ## all figures of bench/RESULTS.md and bench/results/
	$(BIN)/python -m bench.run_all --avx2 $(VENV)-avx2/bin/python \
		$(or $(WORK),$(error WORK names a folder with 40 GB free for large files: make bench WORK=folder))

clean:
	rm -rf $(VENV) $(VENV)-avx2

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[all]'
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/python pyproject.toml .ci/constraints.txt
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[bench]'
	touch $@

# llama.cpp chooses its instructions when it is built: a second environment has one for AVX2 only. Needs a C++ compiler.
$(VENV)-avx2/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-avx2
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" \
		$(VENV)-avx2/bin/python -m pip install -q --no-cache-dir --no-binary llama-cpp-python -e '.[bench]'
	touch $@
