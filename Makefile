# make demo               train the tiny model with GRPO and write a report
# make test               run the tests
# make soak               run the slow tests
# make check              format, lint, requirements
# make tables             measure again what is older than the code (many hours)
# make scale-test         run the tests of scale/
# make scale-server-test  run those of scale/ that need a vLLM server, without a GPU
# make clean              remove the environments
# Each sets up the environment that it needs; a second call installs nothing.

PYTHON ?= $(shell for v in python3 python3.13 python3.12 python3.11; do \
	$$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$v && break; done)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
REQUIREMENTS := $(if $(filter-out 0,$(GPU)),requirements.txt,requirements-cpu.txt)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
INSTALLED := .venv/installed-$(REQUIREMENTS)
RESOLVE := .venv/bin/uv pip compile --quiet --no-config --no-annotate --no-header \
	--only-binary :all: --python-platform x86_64-manylinux_2_31
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test soak tables check resolve install scale-test scale-server-test clean

demo: $(INSTALLED)
	.venv/bin/python grpo.py --lr 2e-4 --max-new-tokens 64 --steps 100 --run-dir $(DEMO)
	.venv/bin/python tools/report.py $(DEMO)

# Two processes, each with whole test files. With a GPU, first the tests that need none.
test: $(INSTALLED)
ifeq ($(REQUIREMENTS),requirements.txt)
	CUDA_VISIBLE_DEVICES= .venv/bin/python -m pytest -n 2 --dist loadfile -m "not gpu and not slow"
	.venv/bin/python -m pytest -m gpu
else
	.venv/bin/python -m pytest -n 2 --dist loadfile
endif

# Fifty kills of a run, and the comparison of two methods from start to end.
soak: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= .venv/bin/python -m pytest -m slow

# `.venv/bin/python benchmark/tables.py --check` only lists it. An interrupted call resumes.
tables: $(INSTALLED)
	.venv/bin/python benchmark/tables.py

check: $(INSTALLED)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	@$(MAKE) --no-print-directory resolve

# The CUDA lists install from the public index alone and name every package they need: with and
# without dependencies they resolve to the same. uv reads metadata, no wheels, and not pip's settings.
unexport UV_DEFAULT_INDEX UV_EXTRA_INDEX_URL UV_FIND_LINKS UV_INDEX UV_INDEX_URL
resolve: $(INSTALLED)
	@echo uv | $(RESOLVE) - >/dev/null 2>&1 || \
		{ echo "skipped: requirements are not resolved, the package index cannot be reached"; exit 0; }; \
	for list in requirements.txt requirements-scale.txt; do for python in 3.11 3.12 3.13; do \
		echo "resolving $$list for Python $$python"; \
		$(RESOLVE) --python-version $$python $$list > .venv/resolved || exit 1; \
		$(RESOLVE) --python-version $$python --no-deps --offline $$list | diff - .venv/resolved || \
			{ echo "error: $$list leaves out the packages above"; exit 1; }; \
	done; done

install: $(INSTALLED)

scale-test: .venv-scale/installed
	.venv-scale/bin/python -m pytest scale/tests

# TRL and what it needs in addition to the packages of .venv, which has vLLM's CPU build. The folder's
# name matters: dill, which datasets uses, pickles modules outside "site-packages" by value and fails.
SERVER := trl|accelerate|datasets|pyarrow|pandas|dill|multiprocess|xxhash|python-dateutil|tzdata
scale-server-test: $(INSTALLED)
	grep -E '^($(SERVER))==' requirements-scale.txt > .venv/server.txt
	$(PIP) --no-deps --upgrade --target .venv-server/site-packages -r .venv/server.txt
	PYTHONPATH=.venv-server/site-packages CUDA_VISIBLE_DEVICES= .venv/bin/python -m pytest \
		scale/tests/test_vllm_server.py

clean:
	rm -rf .venv .venv-scale .venv-server

# torch's CPU build is not on PyPI: pip looks first where it is told to, then at PyTorch's own index.
$(INSTALLED): $(REQUIREMENTS)
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed"; exit 2; }
	@echo "installing $(REQUIREMENTS) into .venv (once, about 4 GB)"
	$(PYTHON) -m venv .venv
ifeq ($(REQUIREMENTS),requirements.txt)
	$(PIP) -r requirements.txt
else
ifeq ($(shell uname -s),Linux)
	$(PIP) --no-deps torch==2.13.0+cpu 2>/dev/null || \
		$(PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
endif
	$(PIP) --no-deps -r requirements-cpu.txt
endif
	@touch $@

.venv-scale/installed: requirements-scale.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed"; exit 2; }
	$(PYTHON) -m venv .venv-scale
ifeq ($(REQUIREMENTS)-$(shell uname -s),requirements-cpu.txt-Linux)
	.venv-scale/bin/python -m pip install --quiet --no-deps torch==2.13.0+cpu 2>/dev/null || \
		.venv-scale/bin/python -m pip install --quiet --no-deps torch==2.13.0+cpu \
			--index-url https://download.pytorch.org/whl/cpu
	sed '/^# What torch.s CUDA build needs/,$$d' requirements-scale.txt > .venv-scale/requirements.txt
else
	cp requirements-scale.txt .venv-scale/requirements.txt
endif
	.venv-scale/bin/python -m pip install --quiet --disable-pip-version-check \
		-r .venv-scale/requirements.txt
	@touch $@
