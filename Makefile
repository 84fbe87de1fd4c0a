# Everything runs in one virtual environment, made on first use and remade when its inputs change.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test check format bench gpu slow clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch by itself and pinned first: left to the resolver, it may bring gigabytes for GPUs.
	$(BIN)/python -m pip install -q $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/spectool demo build/demo

# A worker a core, a thread a worker: the models of the tests are too small for more.
# Bytecode is kept, or every command that a test starts would be compiled again.
test: $(READY)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

slow: $(READY)
	$(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/link_typing.py
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/quantize_memory.py
	$(BIN)/python benchmarks/loop_overhead.py
	$(BIN)/python benchmarks/few_rows.py

# On a machine with a CUDA device and spectool's requirements installed already.
gpu:
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) benchmarks/gpu_products.py --out benchmarks/results/gpu-products.json

clean:
	rm -rf $(VENV) build *.egg-info
