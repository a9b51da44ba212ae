# Two commands: `make run` starts a PowerMail, `make test` proves it. Both do all their set-up.
PYTHON ?= python3
VENV ?= .venv
DATA ?= data
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test demo cluster bench lint clean system-packages planted fuzz

run: $(VENV)/.core
	@exec $(BIN)/powermail serve --init --data $(DATA)

demo: $(VENV)/.core
	@$(BIN)/powermail demo

cluster: $(VENV)/.core
	@exec $(BIN)/powermail cluster demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: requirements/core.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/core.txt
	@echo "$(CURDIR)/src" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/powermail.pth"
	@printf '#!/bin/sh\nexec "%s" -m powermail "$$@"\n' "$(abspath $(BIN))/python" > $(BIN)/powermail && chmod +x $(BIN)/powermail
	@touch $@

$(VENV)/.test: requirements/test.txt $(VENV)/.core
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/test.txt
	@touch $@

lint: $(VENV)/.test
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy src tests bench
	$(BIN)/lint-imports --no-cache

system-packages:
	@sh tests/install-system-packages

test: $(VENV)/.test lint system-packages
	$(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(VENV)/.core
	@sh bench/install-system-packages
	@$(BIN)/python -m bench

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

planted: $(VENV)/.test system-packages
	$(BIN)/python -m tests.planted

$(VENV)/.fuzz: requirements/fuzz.txt $(VENV)/.test
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/fuzz.txt
	@touch $@

fuzz: $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz
