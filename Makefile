# make demo   venv, install, train the translation demo        make test   venv, install, all tests
# make applications   four tasks, each as random policy, warm start, RL and RL + causal credit, in one table
# make parity  the same tensors through other libraries, with verl and OpenRLHF
PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   ?= .venv

BIN := $(VENV)/bin
RUN := $(VENV)/installed-$(TORCH)
DEMO_DIR ?= runs/translation

.PHONY: demo applications test parity bench lint clean

demo: $(RUN)
	$(BIN)/react-fast train --config examples/translation.yaml --run_dir $(DEMO_DIR) --resume auto

applications: $(RUN)
	$(BIN)/react-fast applications examples/*.yaml --out runs/applications

test: $(RUN)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadgroup

parity: $(VENV)/peers-$(TORCH)
	$(BIN)/python -m pytest tests/test_parity_*.py tests/test_presets.py tests/test_objectives_peers.py

bench: $(VENV)/peers-$(TORCH)
	$(BIN)/python -m bench.report --run
	$(BIN)/python -m bench.errors

lint: $(RUN)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet cmake ninja numpy pybind11
	@touch $@

# torch comes first and pinned: a range would fetch gigabytes of CUDA libraries.
$(RUN): $(VENV)/tools pyproject.toml CMakeLists.txt $(wildcard csrc/*) $(wildcard kernels/*.py)
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[train,tasks,triton,bench,dev]"
	@touch $@

# What else the benchmarks and `parity` compare with; torch stays pinned. The dependencies of verl and OpenRLHF want a
# GPU: in their place what the modules that are used import.
$(VENV)/peers-$(TORCH): $(RUN)
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)" -e ".[peers]"
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)" codetiming omegaconf ray tensordict
	$(BIN)/python -m pip install --quiet --no-deps verl openrlhf
	@touch $@

clean:
	rm -rf build dist $(VENV) bench/out
