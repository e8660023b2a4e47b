# make demo | test | lint | fix: everything a contributor runs. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
N ?= 1
TORCH := 2.13.0
# Which build of torch: cpu, cu126 (Volta and older cards, drivers before 580), cu130, or auto: what
# runs on this machine's GPUs. Without one it is cpu, never gigabytes of CUDA by surprise.
TORCH_INDEX ?= auto
# Of the GPU suite: whatever has the packages
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
EXTRAS ?= train,serve,cluster,dev
# `make images` needs no more than the base dependencies.
TOOLS := build/tools
IMAGES_PYTHON := $(if $(wildcard $(VENV)/.installed),$(BIN)/python,$(TOOLS)/bin/python)
IMAGES_READY := $(if $(wildcard $(VENV)/.installed),$(VENV)/.installed,$(TOOLS)/.installed)
# tool:package. Only what is missing is installed: kubectl, say, may come from another archive, whose
# package and Debian's refuse to stand side by side.
# podman and containerd are not among them: large, and what they read is proven where they are.
TEST_TOOLS := g++:g++ docker-registry:docker-registry htpasswd:apache2-utils skopeo:skopeo \
  umoci:umoci kubectl:kubernetes-client curl:curl chromium:chromium lua5.4:lua5.4 \
  promtool:prometheus
BED_PACKAGES := etcd-server containerd runc containernetworking-plugins busybox-static iptables \
  iproute2 openssl curl
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-light test-bed test-cluster test-gpu images test-images test-clients test-vllm \
  slow soak coefficients kernel-counts lint fix lock dist sbom site system clean docs

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 20

install: $(VENV)/.installed  ## make .venv with everything (TORCH_INDEX=auto|cpu|cu126|cu130)

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@case ",$(EXTRAS)," in *,train,*) \
	  $(BIN)/python tools/install_torch.py $(TORCH) $(TORCH_INDEX);; esac
	$(BIN)/python tools/install_locked.py $(EXTRAS),build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

system:  ## what tests need from the system: docker-registry, skopeo, kubectl, chromium, lua, ...
	@missing=""; for pair in $(TEST_TOOLS); do \
	  command -v $${pair%:*} >/dev/null 2>&1 || missing="$$missing $${pair#*:}"; done; \
	test -z "$$missing" && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  echo "Installing$$missing with apt ..."; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else \
	  echo "The tests need$$missing: sudo apt-get install$$missing"; exit 1; \
	fi

demo: install  ## set-up and the main job on the bundled model, no GPU and no account needed
	$(BIN)/python -m tuning run -f examples/workspace-demo.yaml \
	  --base-model examples/tiny-model --data examples/data/demo.jsonl --run-dir runs/demo \
	  --output oci:runs/demo-image --ask "What is Wilma Starling heard playing at concerts?"

test: install system  ## set-up and every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST)

test-light:  ## of spec and presets what needs neither torch nor peft (PYTHON=python3.13)
	@$(MAKE) --no-print-directory install VENV=build/light-$(notdir $(PYTHON)) EXTRAS=cluster,dev
	build/light-$(notdir $(PYTHON))/bin/python -m pytest tests/spec tests/presets --ignore=tests/presets/test_presets.py \
	  -k 'not libraries' $(PYTEST)

slow: install  ## the tests that take minutes: the memory formula against simulation, everywhere
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(PYTEST)

sweep: install  ## every class of models that transformers knows, planned and run (two hours)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m sweep tests/test_sweep.py tests/training/test_own_head.py $(PYTEST)

soak: install system  ## kills, bit rot, broken downloads, servers under load: make soak N=50 (hours)
	SOAK=$(N) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak tests/pipeline/test_kills.py \
	  tests/pipeline/test_stops.py tests/pipeline/test_bit_rot.py tests/sources/test_conversations.py \
	  $(PYTEST)
	SOAK=$(N) SOAK_SECONDS=3600 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout=0 \
	  -k "sigterm_under_load or eight_clients" tests/serve/test_process.py tests/serve/test_http.py \
	  $(PYTEST)

coefficients: install  ## simulate the memory of every preset again: configs/memory (hours)
	OMP_NUM_THREADS=1 $(BIN)/python -m tuning.training.simulate --write

test-gpu:  ## kernels, runs and plans on an NVIDIA GPU, with the packages that are there
	$(GPU_PYTHON) -m pytest -o addopts= --import-mode=importlib -m gpu -rs -v tests/gpu $(PYTEST)

kernel-counts: install  ## count the kernels of a training step again: tests/fake_cuda/kernels.json
	PYTHONPATH=.:tests $(BIN)/python -m fake_cuda.counts

test-vllm: install  ## vLLM on a processor, with what the operator renders (3.5 GB into ~/.cache)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm tests/serve/test_vllm.py $(PYTEST)

test-clients: install  ## lm-eval, guidellm, openai (Python, npm), litellm, langchain, llm, llama.cpp, MLflow, W&B, Helm, checkov (3 GB into ~/.cache)
	@command -v npm >/dev/null || { echo "npm is needed: apt-get install nodejs npm"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m clients tests/serve/test_clients.py tests/trackers \
	  tests/models/test_llama_cpp.py tests/jobs/test_deploy_clients.py tests/test_workflows.py $(PYTEST)

test-bed: system  ## build the API servers for the cluster tests, once, into ~/.cache (root, 10 minutes)
	@apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends $(BED_PACKAGES) >/dev/null
	tests/cluster/build-k8s.sh
	tests/cluster/build-crd-server.sh || echo "NOT BUILT: the CRD server; CEL rules will not be judged"
	@rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}"/tuning-kubernetes/build-*

test-cluster: install  ## the operator on a real API server, with real pods (20 minutes); skips aloud
	@if reasons=$$(tests/cluster/can-run.sh); then \
	  $(MAKE) --no-print-directory test-bed && \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'cluster and not soak' -rs tests/cluster $(PYTEST); \
	else \
	  printf '\n===== SKIPPED: the cluster tests cannot run here =====\n%s\n\n' "$$reasons"; \
	fi

test-images: install test-bed  ## `make images` with buildah, on a base of Debian's packages; one runs the other's Job
	@DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends buildah mmdebstrap >/dev/null
	ENGINES="$(ENGINES)" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'cluster and soak' -rs tests/cluster $(PYTEST)

images: $(IMAGES_READY)  ## build and push both images, then: kubectl apply -k build/deploy (REGISTRY=registry.example.com/team)
	@test -n "$(REGISTRY)" \
	  || { echo "Say where to: make images REGISTRY=registry.example.com/team"; exit 2; }
	$(IMAGES_PYTHON) tools/build_images.py "$(REGISTRY)" $(addprefix --engine=,$(ENGINES)) \
	  $(if $(TAG),--tag="$(TAG)") $(if $(KEY),--key="$(KEY)") $(if $(INSECURE),--insecure) \
	  $(if $(PULL_SECRET),--pull-secret="$(PULL_SECRET)") $(if $(DEPLOY),--deploy="$(DEPLOY)") \
	  $(if $(BUILDER),--builder="$(BUILDER)") $(if $(BASE),--base="$(BASE)") \
	  $(addprefix --sign-option=,$(SIGN_OPTIONS)) $(addprefix --build-option=,$(BUILD_OPTIONS)) \
	  $(addprefix --builder-option=,$(BUILDER_OPTIONS))

$(TOOLS)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import tomllib' || { echo "Python 3.11 or newer is needed: PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv --clear $(TOOLS)
	@$(TOOLS)/bin/python tools/install_locked.py
	@touch $@

lint: install  ## ruff, mypy --strict, import contracts, undeclared imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry . tests tools --no-ansi

fix: install  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## write the files that are generated from the code
	$(BIN)/python tools/write_docs.py
	$(BIN)/python -m benchmarks.speed_page

# mkdocs-material is maintained until May 2027; Zensical, by the same people, reads the same mkdocs.yml.
SITE = $${XDG_CACHE_HOME:-$$HOME/.cache}/tuning-site
site:  ## the pages of docs/ as a site, in build/site; a link that leads nowhere ends it
	test -x $(SITE)/bin/mkdocs || { $(PYTHON) -m venv $(SITE) && \
	  $(SITE)/bin/pip install --quiet 'mkdocs-material>=9.8,<10'; }
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet

RELEASE := build/release
$(RELEASE)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv --clear $(RELEASE)
	@$(RELEASE)/bin/python tools/install_locked.py release,build
	@touch $@

dist: $(RELEASE)/.installed  ## wheel and source archive, in dist/
	rm -rf dist && $(RELEASE)/bin/python -m build --no-isolation --outdir dist .

# What each image has beside its base: the same files, locked, in an environment of their own.
sbom: $(RELEASE)/.installed  ## CycloneDX lists of what operator and engines install, in build/sbom (ENGINES="cu126 cu130")
	@test -f dist/*.whl || $(MAKE) --no-print-directory dist
	set -e; for name in operator $(addprefix engine-,$(or $(ENGINES),cu126 cu130)); do list=build/sbom/$$name; \
	  $(PYTHON) -m venv --clear $$list; extras=cluster; \
	  case $$name in engine-*) extras=train,serve,wandb; \
	    $$list/bin/python tools/install_torch.py $(TORCH) $${name#engine-};; esac; \
	  $$list/bin/python tools/install_locked.py $$extras; \
	  $$list/bin/pip install --quiet --no-deps dist/*.whl; \
	  $(RELEASE)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application \
	    --output-reproducible --output-file $$list.cdx.json $$list/bin/python; \
	  rm -rf $$list; done

# For every Python and processor that PyPI has archives for; of torch the hashes of PyPI's builds.
lock: $(RELEASE)/.installed  ## refresh constraints.txt, with hashes: newest versions that pyproject.toml allows
	$(RELEASE)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header \
	  --no-annotate --generate-hashes --all-extras --group build --group release pyproject.toml \
	  --output-file constraints.txt

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist runs
