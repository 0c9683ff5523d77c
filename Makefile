# make demo, make test: everything a fresh machine with python3 and make needs, in .venv
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
# the lower bounds of pyproject.toml, with the newest NumPy
OLDEST := .venv-oldest
OLDEST_VERSIONS := torch==2.11.* triton==3.6.* torchvision==0.26.* 'numpy>=2.4'

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest bench kernel-table docs gallery lint dist-test clean

help:
	@echo "make demo          train a small AlexNet on real pictures and show what it learnt (results in runs/demo)"
	@echo "make test          the fast tests, on the CPU"
	@echo "make test-all      all tests, and twenty minutes of fuzzing"
	@echo "make test-oldest   the fast tests with the oldest PyTorch and Triton that are supported, in $(OLDEST)"
	@echo "make bench         timings against PyTorch (results in runs/bench)"
	@echo "make docs          the documentation as a site: build/site/index.html"
	@echo "make kernel-table  machine code and traffic of the kernels: docs/kernels.md, tests/kernels/baseline.json"
	@echo "make gallery       docs/gallery.md with its pictures, experiments included"
	@echo "make lint          ruff and mypy"
	@echo "make dist-test     wheel and source distribution, in environments of their own"
	@echo "make clean         remove $(VENV), $(OLDEST), build and dist"

# twice quiet: errors alone
INSTALL := -m pip install -qq --disable-pip-version-check

# A stamp is younger than pyproject.toml when its part of the environment is complete.
$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/demo $(VENV)/docs $(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV), once; PyTorch is most of it"
	@$(RUN) $(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@
$(VENV)/demo: EXTRAS = cli,cpu
$(VENV)/docs: EXTRAS = docs
$(VENV)/installed: EXTRAS = dev

demo: $(VENV)/demo
	@$(RUN) -m fastalex demo

# two processes with one thread each: on two cores faster than one process with two threads
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(VENV)/installed
	FASTALEX_FUZZ=long OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

$(OLDEST)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(INSTALL) -e '.[test,bench]' $(OLDEST_VERSIONS)
	touch $@

test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

bench: $(VENV)/installed
	mkdir -p runs/bench
	$(RUN) -m pytest benchmarks --benchmark-only --benchmark-json runs/bench/results.json
	$(RUN) -m fastalex bench report runs/bench/results.json

kernel-table: $(VENV)/installed
	$(RUN) -m fastalex inspect --markdown docs/kernels.md --json tests/kernels/baseline.json

# strict: a broken link, a missing name or a wrong reference ends it
docs: $(VENV)/docs
	@$(RUN) docs/make_site.py

gallery: $(VENV)/installed
	$(RUN) docs/make_gallery.py

lint: $(VENV)/installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

# wheel and source distribution, built, installed and tried with every Python from 3.10 on that is found
dist-test: $(VENV)/installed
	$(RUN) tests/try_distributions.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist
