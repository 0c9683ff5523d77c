# make demo, make test: everything a fresh machine with python3 and make needs, in .venv
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench kernel-table gallery lint clean

help:
	@echo "make demo      train a small AlexNet on real pictures and show what it learnt (results in runs/demo)"
	@echo "make test      the fast tests, on the CPU"
	@echo "make test-all  all tests, and twenty minutes of fuzzing"
	@echo "make bench     timings against PyTorch (results in runs/bench)"
	@echo "make kernel-table  machine code and traffic of the kernels: docs/kernels.md, tests/kernels/baseline.json"
	@echo "make gallery   docs/gallery.md with its pictures, experiments included"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove $(VENV)"

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
	rm -rf $(VENV)
