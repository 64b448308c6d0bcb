# Two commands matter: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: demo test test-all install install-dev browser

demo: install
	@$(BIN)/edgetune run recipes/quickstart.yaml; code=$$?; test $$code -eq 3 -o $$code -eq 4 -o $$code -eq 0

test: install-dev
	scripts/check

test-all: install-dev
	scripts/check --all

install:
	@$(PYTHON) scripts/install.py --venv $(VENV) --extra demo

# The report's browser test wants Chromium; where it cannot be had the test says so and is skipped.
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq >/dev/null && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || \
		echo "no chromium: the browser test will be skipped"

install-dev: browser
	@$(PYTHON) scripts/install.py --venv $(VENV) --extra demo --extra dev
