# make demo and make test start from nothing: they create .venv and install into it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PYTEST := $(PY) -m pytest --numprocesses auto --dist worksteal

.PHONY: demo test test-all lint format clean

demo: $(READY)
	$(PY) examples/demo.py

test: $(READY)
	$(PYTEST) -m "not slow"

# the slow ones one after the other: some use all cores, some are clusters that watch the clock
test-all: test
	$(PY) -m pytest -m slow

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(READY): setup.py pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[test,train,hub]"
	touch $@
