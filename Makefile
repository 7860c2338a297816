# make demo   venv, install, train the translation demo        make test   venv, install, all tests
PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   ?= .venv

BIN := $(VENV)/bin
RUN := $(VENV)/installed-$(TORCH)
DEMO_DIR ?= runs/translation

.PHONY: demo test bench lint clean

demo: $(RUN)
	$(BIN)/react-fast train --config examples/translation.yaml --run_dir $(DEMO_DIR) --resume auto

test: $(RUN)
	$(BIN)/python -m pytest tests

bench: $(VENV)/peers-$(TORCH)
	$(BIN)/python -m bench.report --run
	$(BIN)/python -m bench.errors

lint: $(RUN)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and pinned: a range would fetch gigabytes of CUDA libraries.
$(RUN): pyproject.toml CMakeLists.txt $(wildcard csrc/*) $(wildcard kernels/*.py)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)" numpy
	$(BIN)/python -m pip install --quiet -e ".[train,tasks,triton,bench,dev]"
	@touch $@

# What the benchmarks compare with; torch stays pinned.
$(VENV)/peers-$(TORCH): $(RUN)
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)" -e ".[peers]"
	@touch $@

clean:
	rm -rf build dist $(VENV) bench/out
