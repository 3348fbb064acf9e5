PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[hub,wandb,test]' || \
	  { echo "error: installation failed, see above; a package without a wheel for this machine" \
	    "needs a C++ compiler and Python's headers (apt-get install g++ python3-dev)" >&2; exit 1; }
	@touch $(STAMP)

demo: setup
	$(BIN)/pretrain demo --out demo

test: setup
	$(BIN)/python -m pytest -q

lint: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lint]'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy pretrain models data_pipeline launchers

clean:
	rm -rf demo build *.egg-info
