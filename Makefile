# Two commands matter: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: demo test test-all check install install-dev

demo: install
	@$(BIN)/edgetune run recipes/quickstart.yaml; code=$$?; test $$code -eq 3 -o $$code -eq 4 -o $$code -eq 0

test: install-dev
	scripts/check

test-all: install-dev
	scripts/check --all

install:
	@$(PYTHON) scripts/install.py --venv $(VENV) --extra demo

install-dev:
	@$(PYTHON) scripts/install.py --venv $(VENV) --extra demo --extra dev
