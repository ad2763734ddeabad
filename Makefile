# bnml: every command an operator needs. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV  := .venv
BIN   := $(CURDIR)/$(VENV)/bin
PY    := $(BIN)/python
export PATH := $(BIN):$(PATH)
# one thread per library: two training libraries that each take every core are slower than one
export OMP_NUM_THREADS ?= 2
ARGS ?=
REPORT ?= backtest

.PHONY: help setup lab test test-sync test-rooms test-system test-research validate demo bench drill train backtest report analyze-last-month realtime-paper paper panel pictures clean lock

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

$(VENV)/.ready: constraints.txt settings.ini setup.py tests/make_venv.sh
	@bash tests/make_venv.sh $(VENV)
	@touch $@

setup: $(VENV)/.ready  ## make .venv from the lock and install the notebook hooks
	@git rev-parse --git-dir >/dev/null 2>&1 && nbdev_install_hooks || echo "not a git checkout: notebook hooks skipped"

lab: $(VENV)/.ready  ## open JupyterLab on the tour of the notebooks (ARGS="--no-browser --port 8890")
	jupyter lab nbs --LabApp.default_url=/lab/tree/index.ipynb $(ARGS)

demo: $(VENV)/.ready  ## the main job on a synthetic market: train, backtest, report, paper (ends with a table)
	@$(PY) -m bnml.demo $(ARGS)

test: test-sync test-rooms test-system test-research  ## everything: sync check, rooms, system tests, research notebooks
	@echo "make test: all four parts passed"

test-sync: $(VENV)/.ready
	@bash tests/sync_check.sh

test-rooms: $(VENV)/.ready
	@echo "== rooms: every library notebook runs alone"
	@home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT && BNML_HOME="$$home" IN_TEST=1 \
	  nbdev_test --n_workers 3 --skip_folder_re '^(research|reports)$$|^[_.]'

test-system: $(VENV)/.ready
	@echo "== system tests"
	@IN_TEST=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-research: $(VENV)/.ready
	@echo "== research notebooks"
	@copies=$$(mktemp -d) && home=$$(mktemp -d) && trap 'rm -rf "$$copies" "$$home"' EXIT \
	  && $(PY) tests/restore_counts.py nbs/research "$$copies" \
	  && BNML_HOME="$$home" IN_TEST=1 $(PY) -m pytest -p tests.kernels --nbval-lax --nbval-kernel-startup-timeout 90 -q -n 3 --dist loadfile --no-loadscope-reorder -p no:cacheprovider --rootdir "$$copies" $$(ls -r "$$copies"/*.ipynb)

validate: $(VENV)/.ready  ## the quick gate before a commit: sync, secrets, bot.yaml, floors, help; stops at the first that fails
	@bash tests/sync_check.sh
	@echo "== secrets: none in what git tracks"
	@bnml secrets guard --path .
	@echo "== settings: bot.yaml is sound"
	@bnml config check --config bot.yaml
	@echo "== floors and help: imports go down, guests keep to their door, every command says how it is called"
	@IN_TEST=1 $(PY) -m pytest tests/test_floors.py tests/test_help.py -q
	@echo "make validate: all five checks passed"

bench: $(VENV)/.ready  ## measure speed against the raw libraries and print JSON
	@$(PY) -c "import backtesting, pandas_ta_classic" 2>/dev/null || bash tests/make_venv.sh $(VENV) bench
	@$(PY) -m tests.bench $(ARGS)

drill: $(VENV)/.ready  ## every fault, kill, state machine and long replay, hours (ARGS="--only replays")
	@$(PY) -m tests.drill $(ARGS)

train: $(VENV)/.ready  ## train and publish models (ARGS="--symbols BTCUSDT --to 2025-03-01")
	@bnml train $(ARGS)

backtest: $(VENV)/.ready  ## backtest the published models (ARGS="--from 2025-03-01 --to 2025-09-30")
	@bnml backtest $(ARGS)

report: $(VENV)/.ready  ## execute a report (REPORT=backtest|training) and print the HTML's path
	@bnml report $(REPORT) $(ARGS)

analyze-last-month: $(VENV)/.ready  ## ready for live keys? JSON and CSV (ARGS="--symbols BTCUSDT --interval 1h --days 30 --max-combinations 40 --fetch")
	@bnml analyze-last-month $(ARGS)

realtime-paper: $(VENV)/.ready  ## real bids and asks as JSON lines, no keys, no orders (ARGS="--symbols BTCUSDT --interval 1m --iterations 20")
	@bnml realtime-paper $(ARGS)

paper: $(VENV)/.ready  ## trade paper until Ctrl-C (ARGS="--replay 2025-09-01:2025-09-30")
	@$(PY) -m bnml.runner --mode paper $(ARGS)

panel: $(VENV)/.ready  ## open the control panel in the browser (Voilà)
	@bnml panel $(ARGS)

pictures: $(VENV)/.ready  ## make the README's pictures again (after make demo; needs Chromium)
	@$(PY) -m tests.pictures

lock: $(VENV)/.ready  ## resolve the dependencies of settings.ini again into constraints.txt
	uv pip compile setup.py --all-extras --universal --python-version 3.11 --no-annotate --no-header -q --upgrade -o constraints.txt

clean:  ## remove the environment and caches; data/ and reports/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +
