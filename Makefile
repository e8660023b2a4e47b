# make demo | test | lint | fix: everything a contributor runs. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
# Which build of torch: cpu, cu126 (Volta and older cards) or cu130. A machine without an NVIDIA
# driver gets the CPU build, never gigabytes of CUDA by surprise.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cu130 || echo cpu)
EXTRAS ?= train,serve,cluster,dev
APT_PACKAGES := docker-registry apache2-utils skopeo
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint fix lock system clean docs

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 20

install: $(VENV)/.installed  ## make .venv with everything (TORCH_INDEX=cpu|cu126|cu130)

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python tools/install_torch.py $(TORCH) $(TORCH_INDEX)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
