# Two commands on a fresh machine: each sets up what it needs first.
#
#   make pretrain    virtual environment, install, then `fastssl pretrain --arch mobilenetv3_large` on the sample photos
#   make test        the same environment with the test extras, then the suite but for what is marked slow
#   make test-all    the whole suite, several files at once; what judges times comes last, alone
#   make test-engines    of the suite what needs another engine: all must be installed ('.[ffcv,dali,torchcodec]')
#   make lint        ruff, mypy, import-linter
#   make docs        the pages as a site, in build/site
#   make soak        two hours of what a long run meets: is it steady, does it survive being killed
#
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/first-light
BIN    := $(VENV)/bin

.PHONY: pretrain test test-all test-engines lint docs bench soak clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# Modules are compiled when they are first imported, and kept: compiling all that comes with torch beforehand takes a minute.
unexport PYTHONDONTWRITEBYTECODE

# The stamps name what they were made from: a change of setup.cfg installs again.
$(VENV)/.installed: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-compile -e '.[test]'
	touch $@

pretrain: $(VENV)/.installed
	$(BIN)/fastssl pretrain --arch mobilenetv3_large --out $(OUT)

# Several files at once, but for what judges times.
PYTEST := $(BIN)/python -m pytest
TOGETHER := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test
	$(PYTEST) -m "not (gpu or timed or slow)" $(TOGETHER)

test-all: $(VENV)/.installed-test
	status=0; $(PYTEST) -m "not (gpu or timed)" $(TOGETHER) || status=$$?; \
	$(PYTEST) -m "timed and not gpu" || status=$$?; exit $$status

# An engine that is missing is a failure here, and not a skip.
test-engines: export FASTSSL_ALL_ENGINES = 1
test-engines: $(VENV)/.installed-test
	status=0; $(PYTEST) -m "engines and not (gpu or timed)" $(TOGETHER) || status=$$?; \
	$(PYTEST) -m "engines and timed and not gpu" || status=$$?; exit $$status

# import-linter and mypy find packages by their folders: in build/tree pipelines/ and benchmarks/ stand where they are imported from.
lint: $(VENV)/.installed-test
	$(BIN)/ruff check fastssl pipelines benchmarks tests
	$(BIN)/ruff format --check fastssl pipelines benchmarks tests
	rm -rf build/tree && mkdir -p build/tree/fastssl
	ln -s $(CURDIR)/fastssl/* $(CURDIR)/pipelines $(CURDIR)/benchmarks build/tree/fastssl/
	cd build/tree && $(abspath $(BIN))/lint-imports --config ../../.importlinter
	$(BIN)/python -m mypy

# In build/docs the pages stand where they stand in the repository, so that links between them hold on the site, too.
DOCS := README.md CONTRIBUTING.md docs benchmarks/results fastssl/recipes fastssl/config fastssl/methods fastssl/data
docs: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	rm -rf build/docs && mkdir -p build/docs/fastssl build/docs/benchmarks
	for page in $(DOCS); do ln -s $(CURDIR)/$$page build/docs/$$page; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed
	bash benchmarks/gpu.sh --python $(BIN)/python

# An hour's run watched from outside, then commands killed at random moments; what came out last is in benchmarks/results/soak.
soak: $(VENV)/.installed-test
	mkdir -p runs
	$(BIN)/python tests/soak/soak.py --minutes 60 --json runs/soak.jsonl; steady=$$?; \
	$(BIN)/python tests/soak/kills.py --kills 50 --json runs/kills.json && exit $$steady

clean:
	rm -rf $(VENV) runs build dist *.egg-info
