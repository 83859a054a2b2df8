# `make demo` and `make test` are all a newcomer needs. Both make .venv first, which is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
METHOD := $(patsubst %,tests/test_%.py,plan exact exact_random relay autograd errors house)

.PHONY: demo test check lint types docs docs-serve bench clean

demo: $(STAMP)  ## train standard BP, multi-loss and relay on handwritten digits and write a report
	$(BIN)/relaylab demo $(ARGS)

test: $(STAMP)  ## the test suite on all cores, except the slow tests
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: $(STAMP)  ## the tests of the method only
	$(BIN)/python -m pytest -n auto --dist loadfile $(METHOD) $(ARGS)

lint: $(STAMP)  ## ruff, and Markdown at 100 columns
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m docs.wrap --check  # python -m docs.wrap wraps them

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)  ## the documentation in build/site, which needs no network; a broken link is an error
	$(BIN)/python -m mkdocs build --strict --quiet $(ARGS)

docs-serve: export NO_MKDOCS_2_WARNING = 1
docs-serve: $(STAMP)  ## the documentation on http://127.0.0.1:8000, rebuilt when a page changes
	$(BIN)/python -m mkdocs serve $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.engine $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed; this is %d.%d. Say: make PYTHON=python3.12" % v[:2])'
	@echo 'Installing pinned packages into $(VENV) (about 6 GB, once) ...'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist build
