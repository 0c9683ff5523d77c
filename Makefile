# make demo, make test: everything a fresh machine with python3 and make needs, in .venv
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
# the lower bounds of pyproject.toml, with the newest NumPy
OLDEST := .venv-oldest
OLDEST_VERSIONS := torch==2.11.* triton==3.6.* torchvision==0.26.* 'numpy>=2.4'

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest bench kernel-table gallery lint clean

help:
	@echo "make demo      train a small AlexNet on real pictures and show what it learnt (results in runs/demo)"
	@echo "make test      the fast tests, on the CPU"
	@echo "make test-all  all tests, and twenty minutes of fuzzing"
	@echo "make test-oldest  the fast tests with the oldest PyTorch and Triton that are supported, in $(OLDEST)"
	@echo "make bench     timings against PyTorch (results in runs/bench)"
	@echo "make kernel-table  machine code and traffic of the kernels: docs/kernels.md, tests/kernels/baseline.json"
	@echo "make gallery   docs/gallery.md with its pictures, experiments included"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove $(VENV) and $(OLDEST)"

# the stamp is younger than pyproject.toml when the environment is complete
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --upgrade pip
	$(RUN) -m pip install -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(RUN) -m fastalex demo

# two processes with one thread each: on two cores faster than one process with two threads
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(VENV)/installed
	FASTALEX_FUZZ=long OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

$(OLDEST)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --upgrade pip
	$(OLDEST)/bin/python -m pip install -e '.[test,bench]' $(OLDEST_VERSIONS)
	touch $@

test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

bench: $(VENV)/installed
	mkdir -p runs/bench
	$(RUN) -m pytest benchmarks --benchmark-only --benchmark-json runs/bench/results.json
	$(RUN) -m fastalex bench report runs/bench/results.json

kernel-table: $(VENV)/installed
	$(RUN) -m fastalex inspect --markdown docs/kernels.md --json tests/kernels/baseline.json

gallery: $(VENV)/installed
	$(RUN) docs/make_gallery.py

lint: $(VENV)/installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) $(OLDEST)
