# make demo    train the tiny model with GRPO and write a report      make test    run the tests
# make check   format and lint                                        make clean   remove .venv
# make scale-test   the tests of scale/, in .venv-scale
# Each sets up .venv by itself; a second call installs nothing.

PYTHON ?= $(shell for v in python3 python3.13 python3.12 python3.11; do \
	$$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$v && break; done)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
REQUIREMENTS := $(if $(filter-out 0,$(GPU)),requirements.txt,requirements-cpu.txt)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
INSTALLED := .venv/installed-$(REQUIREMENTS)
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test check install scale-test clean

demo: $(INSTALLED)
	.venv/bin/python grpo.py --lr 2e-4 --max-new-tokens 64 --steps 100 --run-dir $(DEMO)
	.venv/bin/python tools/report.py $(DEMO)

test: $(INSTALLED)
	.venv/bin/python -m pytest

check: $(INSTALLED)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

install: $(INSTALLED)

scale-test: .venv-scale/installed
	.venv-scale/bin/python -m pytest scale/tests

clean:
	rm -rf .venv .venv-scale

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
endif
	.venv-scale/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-scale.txt
	@touch $@
