# Everything here works in a fresh clone: it needs python3 (3.11 or newer), make and a Python package index.
#
# TORCH picks the torch to install before anything else. On Linux the package index has the CUDA build; for a small
# CPU-only install:  make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= runtime,dashboard,dev

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv demo dashboard test test-all lint format bench readme clean

help:
	@echo "make demo       forecast, train and measure a small model here, and compare (minutes)"
	@echo "make dashboard  open the dashboard on what the demo measured"
	@echo "make test       lint, types, import rules and the quick tests"
	@echo "make test-all   the same with the slow tests"
	@echo "make lint       ruff, mypy and import rules only"
	@echo "make readme     put today's forecasts into the README"
	@echo "make bench      speed of predict, plan, start-up and fake ranks; overhead of the runtime; kernels; rates of the gate"

venv: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	$(BIN)/zerocast demo --store .zerocast/demo/records.db

dashboard: $(STAMP)
	$(BIN)/zerocast dashboard --store .zerocast/demo/records.db

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two at a time, then one at a time those that other tests would disturb.
test: lint
	$(BIN)/pytest -q -m "not slow and not alone" -n 2 --dist loadfile
	$(BIN)/pytest -q -m "not slow and alone"

test-all: lint
	$(BIN)/pytest -q -m "not alone" -n 2 --dist loadfile
	$(BIN)/pytest -q -m alone

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_predict.py
	$(BIN)/python benchmarks/bench_fake.py
	$(BIN)/python benchmarks/bench_overhead.py
	$(BIN)/python benchmarks/bench_kernels.py
	$(BIN)/python benchmarks/bench_gate.py

readme: $(STAMP)
	$(BIN)/python docs/refresh.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
