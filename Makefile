# make quickstart: a small MAE on handwritten digits, from nothing.   make test: every test, in the same environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -q

.PHONY: quickstart test lint format types clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m jaxpretrain.main --config=configs/mae.py:digits --workdir=runs/mae-digits

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist=worksteal $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) -e .[dev,torch]
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
