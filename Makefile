# Every target does the set-up that it needs. Variables:
#   PYTHON=/path/to/python   the interpreter for .venv (3.10 to 3.13; default: python3)
#   ARGS='-k name -x'        passed on to pytest, to `engines demo`, to the resolver of `make lock`, …

BIN := .venv/bin
# A test that waits leaves its core to another. Each worker has an etcd, and takes tests from those
# that have more left.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
export PYTHON
# Where the environment forbids bytecode, each worker would compile and rewrite all tests anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-all test-compose test-engines test-rdma test-browser test-prometheus coverage mutate dist docs bench bench-scale bench-peers lint format lock clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 14

setup: ## make .venv ready (all other targets do it by themselves)
	@scripts/setup.sh

demo: setup ## two ranks serve a real checkpoint, two others load it, one dies
	@$(BIN)/engines demo $(ARGS)

test: lint ## lint, then all tests but those that are slow by nature
	$(BIN)/pytest $(PARALLEL) -m "not slow" $(ARGS)

test-slow: setup ## the tests that are slow by nature: soaks, benchmarks, the second etcd
	$(BIN)/pytest -n 2 --dist worksteal -m slow --durations=10 $(ARGS)

test-all: test test-slow ## every test but those of docker-compose.yml

coverage: setup ## every test again, and how much of each package they run (an hour)
	$(BIN)/pytest --cov --cov-report= $(ARGS)
	@$(BIN)/python -m scripts.coverage_by_package

test-compose: setup ## docker-compose.yml run for real (root or a docker daemon; minutes)
	@scripts/compose_tools.sh
	$(BIN)/pytest tests/compose -v -o faulthandler_timeout=1800 $(ARGS)

test-engines: setup ## the integrations with a real vLLM and a real SGLang, on CPUs (6 GB of disk)
	@scripts/engines_setup.sh vllm
	@scripts/engines_setup.sh sglang
	$(BIN)/pytest tests/engines -v -m engines -o faulthandler_timeout=1800 $(ARGS)

test-rdma: setup ## loads over RDMA in software, between virtual machines (4 GB of disk; minutes)
	@scripts/rdma/setup.sh
	$(BIN)/pytest tests/rdma -v -m rdma --durations=0 -o timeout=1800 -o faulthandler_timeout=2400 $(ARGS)

test-browser: setup ## the page of `engines dashboard` in a real browser (chromium; a minute)
	@scripts/browser_setup.sh
	PYTHONPATH=.browser $(BIN)/pytest tests/browser -v $(ARGS)

test-prometheus: setup ## the alerts and the dashboard with a real Prometheus (20 MB of download)
	@scripts/prometheus_setup.sh
	PYTHONPATH=.prometheus/python $(BIN)/pytest tests/prometheus -v $(ARGS)

mutate: setup ## change modules and see whether tests notice: ARGS='FILE.py -t TESTFILE' (by hand)
	$(BIN)/python -m scripts.mutate $(ARGS)

dist: setup ## sdist and wheel into dist/, and the wheel tried on each Python of this machine
	@$(BIN)/python -m scripts.dist

docs: setup ## build the pages of docs/ into site/, and fail for every broken link
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup ## figures of the control plane, the gateway and loading (minutes)
	$(BIN)/python -m benchmarks.registry $(ARGS)
	$(BIN)/python -m benchmarks.gateway $(ARGS)
	$(BIN)/python -m benchmarks.load $(ARGS)
	$(BIN)/python -m benchmarks.reshard $(ARGS)

bench-scale: setup ## what joins, claims and watches cost as ranks grow in number (an hour)
	$(BIN)/python -m benchmarks.scale $(ARGS)

bench-peers: setup ## loads beside those of other products, all on this machine (2 GB of disk; two hours)
	@scripts/peers_setup.sh
	$(BIN)/python -m benchmarks.peers $(ARGS)

lint: setup ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup ## let ruff format and fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lock: ## resolve constraints.txt anew from pyproject.toml
	@scripts/setup.sh lock $(ARGS)

clean: ## remove .venv and what tools and builds left
	rm -rf .venv .venv.lock .browser .prometheus build dist site .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find registry loader cli benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
