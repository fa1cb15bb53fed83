# Every target makes .venv at its first use. Start with: make demo
PYTHON ?= python3
# Extra arguments for installing torch: on Linux its default build brings CUDA, an index of CPU builds does not.
TORCH_PIP_ARGS ?=
EXTRAS := deepspeed,report,tasks,jobs,dev

BIN := $(CURDIR)/.venv/bin
PY := $(BIN)/python
STAMP := .venv/.installed
# The libraries that the benchmarks compare with stay out of .venv.
BENCH_PY := $(CURDIR)/.venv-bench/bin/python
BENCH_STAMP := .venv-bench/.installed
THREADS ?= 1
# Test files side by side: most of a test's time is spent in waiting for processes to start.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS = $(THREADS)
export MKL_NUM_THREADS = $(THREADS)
export OPENBLAS_NUM_THREADS = $(THREADS)
# DeepSpeed compiles some of its operators at their first use: here, not where other environments would share them.
export TORCH_EXTENSIONS_DIR = $(CURDIR)/.cache/torch_extensions
export RAY_USAGE_STATS_ENABLED = 0

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check bench clean unlock compiler

help: ## say what the targets do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP) unlock compiler ## train a small transformer on true and on permuted labels, measure both, write runs/demo.html
	DS_ACCELERATOR=cpu $(PY) jobs/demo.py

test: $(STAMP) unlock ## the tests that need neither a GPU, several machines nor much time
	$(PY) -m pytest $(PARALLEL)

test-all: $(STAMP) unlock ## every test, whatever it needs
	$(PY) -m pytest -m "" $(PARALLEL)

check: $(STAMP) ## style, types and the layers of the design
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) $(BENCH_STAMP) unlock ## what measuring costs and how far sketches are off, beside other libraries (an hour and a half)
	PYTHONPATH=$(CURDIR) $(BENCH_PY) benchmarks/bench_gradients.py
	$(PY) benchmarks/bench_shard.py
	PYTHONPATH=$(CURDIR) $(BENCH_PY) benchmarks/bench_sketches.py --subjects ""  # holds the peers' definitions to bergson
	$(PY) benchmarks/bench_sketches.py
	$(PY) benchmarks/bench_store.py
	$(PY) benchmarks/bench_curvature.py
	$(PY) benchmarks/bench_spectrum.py
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BENCH_PY) benchmarks/bench_correctness.py

clean: ## remove caches, runs and build products; .venv and .venv-bench stay
	rm -rf .cache runs build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A compilation that was killed leaves its lock behind, and every later one would wait for it without a word.
# None takes five minutes, so an older lock has no owner.
unlock:
	@mkdir -p $(TORCH_EXTENSIONS_DIR)
	@find $(TORCH_EXTENSIONS_DIR) -name lock -mmin +5 -print -delete | sed 's/^/removed the stale lock /'

# The demonstration's DeepSpeed is told to do without its compiled operators; other trainings want them.
compiler:
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		echo "note: no C++ compiler found. The demonstration needs none, but DeepSpeed compiles operators (CPU Adam," \
		"shared memory) for other trainings: install one, for instance with: apt-get install g++"

# torch comes first and nothing after it may replace it: another build could be another version, or bring CUDA.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt $(TORCH_PIP_ARGS) torch
	@set -e; version() { $(PY) -c "from importlib.metadata import version; print(version('torch'))"; }; \
	before=$$(version); \
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'; \
	after=$$(version); \
	test "$$before" = "$$after" || { echo "torch must stay $$before, got $$after; delete .venv and try again"; exit 1; }
	@touch $@

$(BENCH_STAMP): benchmarks/requirements-peers.txt constraints.txt
	test -x $(BENCH_PY) || $(PYTHON) -m venv .venv-bench
	$(BENCH_PY) -m pip install --disable-pip-version-check -c constraints.txt $(TORCH_PIP_ARGS) torch
	$(BENCH_PY) -m pip install --disable-pip-version-check --no-deps -r benchmarks/requirements-peers.txt
	@touch $@
