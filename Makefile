PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTS := $(VENV)/.installed-tests
PEERS := .venv-bench/.installed
SITE := .venv-docs/.installed

.PHONY: help setup demo test test-fast test-long test-torch faults bench lint docs study clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install into .venv (PYTHON=python3.12 chooses the interpreter)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[hub,wandb,tensorboard,slurm,optimizers,vision]' || \
	  { echo "error: installation failed, see above; a package without a wheel for this machine" \
	    "needs a C++ compiler and Python's headers (apt-get install g++ python3-dev)" >&2; exit 1; }
	@touch $(STAMP)

$(TESTS): $(STAMP)
	@echo "installing what the tests need ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[hub,wandb,tensorboard,slurm,optimizers,vision,test]'
	@touch $(TESTS)

demo: setup  ## corpus, tokenizer, tokens, four decays, report: minutes on two CPU cores
	$(BIN)/pretrain demo --out demo

# Three workers for two cores: a part of the time is waiting (for Slurm, dead machines, slow disks).
test: $(TESTS)  ## the whole suite, on two cores
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test-fast: $(TESTS)  ## the tests that are not marked slow, before each commit
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not long"

# Rows that `make test` leaves out: whole matrices, fuzzing, real machines. Hours; as root, all of it.
test-long: $(TESTS)  ## the whole suite with the rows that make test leaves out: hours
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --long

# The numeric tests on another declared version of torch, in an environment of its own:
# make test-torch TORCH=2.11.0
NUMERIC := $(addprefix tests/, engine/test_grid.py engine/test_grid_sums.py engine/test_norms.py \
  engine/test_speed.py decay/test_decay_applied.py decay/test_policies.py offline/test_evaluate.py \
  ranks/test_spectra.py checkpoint/test_resume.py models/test_models.py tasks/test_tasks.py \
  models/test_bf16.py engine/test_grid_gradients.py)
test-torch: pyproject.toml  ## the numeric tests on another torch, in its own environment: TORCH=2.11.0
	@test -n "$(TORCH)" || { echo "error: say which torch: make test-torch TORCH=2.11.0" >&2; exit 1; }
	@test -x .venv-torch-$(TORCH)/bin/python || $(PYTHON) -m venv .venv-torch-$(TORCH)
	@echo "installing torch $(TORCH) into .venv-torch-$(TORCH) ..."
	@.venv-torch-$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check \
	  torch==$(TORCH) -e '.[hub,optimizers,vision,test]'
	.venv-torch-$(TORCH)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(NUMERIC)

# The part of it that injects faults, and every grid; its table of faults goes to faults.json.
faults: $(TESTS)  ## the long form of the fault suite and every grid; as root, all of it
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests/faults \
	  tests/launchers/test_launch.py tests/engine/test_grid.py tests/engine/test_grid_gradients.py \
	  tests/engine/test_flat_update.py tests/engine/test_speed.py tests/decay/test_decay_applied.py \
	  tests/test_docs_code.py --long --faults faults.json

# Training, statistics, data and waiting times beside the peers; half an hour, quiet cores please.
# In an environment of its own: the peers want other versions of what the product uses.
RESULTS ?= bench
bench: $(PEERS)  ## speed beside other libraries, in its own environment: half an hour, quiet cores
	@mkdir -p $(RESULTS)
	.venv-bench/bin/python benchmarks/training.py --out $(RESULTS)/training.json
	.venv-bench/bin/python benchmarks/rank_statistics.py --out $(RESULTS)/rank_statistics.json
	.venv-bench/bin/python benchmarks/data.py --out $(RESULTS)/data.json
	.venv-bench/bin/python benchmarks/latency.py --out $(RESULTS)/latency.json

$(PEERS): pyproject.toml
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@echo "installing the peers into .venv-bench ..."
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $(PEERS)

lint: $(TESTS)  ## ruff format, ruff check, mypy
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lint]'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy pretrain models data_pipeline launchers tests benchmarks

docs: $(SITE)  ## the pages as a site, in its own environment: build/site/index.html
	.venv-docs/bin/sphinx-build -E -W --keep-going -q -b html -c docs . build/site
	@echo "written: build/site/index.html"

$(SITE): docs/requirements.txt
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	@echo "installing Sphinx into .venv-docs ..."
	@.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $(SITE)

# The study of docs/studies: data from this Python installation, fifteen runs, tables and figures.
STUDY := docs/studies/attention-decay
study: setup  ## the runs, tables and figures of docs/studies: half an hour on two CPU cores
	$(BIN)/pretrain data corpus --out data/corpus-text
	test -f data/corpus.model || $(BIN)/pretrain data tokenizer data/corpus-text \
	  --type unigram --vocab-size 4096 --out data/corpus.model
	$(BIN)/pretrain data tokenize data/corpus-text --tokenizer data/corpus.model --out data/corpus
	$(BIN)/pretrain sweep configs/studies/attention-decay.yaml --out runs/attention-decay
	$(BIN)/pretrain report runs/attention-decay --format md --out $(STUDY)/report.md
	$(BIN)/pretrain report runs/attention-decay --format csv --out $(STUDY)/csv
	rm -f $(STUDY)/csv/spectra.csv $(STUDY)/csv/settings.csv $(STUDY)/csv/row-norms.csv

clean:  ## remove what demo and builds leave
	rm -rf demo build *.egg-info
