# Two images from one tree, which `make images` builds and pushes:
#   engine    what a Job runs (python -m tuning), with torch for CUDA        docker build --target engine .
#   operator  what watches Workspaces (python -m jobs), without torch        docker build --target operator .
#
# BASE is any Debian with Python 3.11 or newer and pip, as NAME:TAG or NAME@DIGEST: `make images` builds on
# the digest that the tag has then, and notes both as labels of the image. Torch's wheels bring CUDA's
# libraries along, so that the base needs none. TORCH_INDEX is the build of torch: cu130, cu126 (Volta and
# older cards, drivers before 580) or cpu. An engine for each of configs/engines.yaml serves every GPU; the
# operator's option `images` names them. Each archive but torch's has its hash in constraints.txt.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS python
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv
COPY constraints.txt pyproject.toml README.md CHANGELOG.md LICENSE /src/
COPY tools/install_locked.py /src/tools/
WORKDIR /src

FROM python AS wheel
RUN python tools/install_locked.py build
COPY tuning /src/tuning
COPY jobs /src/jobs
COPY configs /src/configs
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python AS operator
RUN python tools/install_locked.py cluster
COPY --from=wheel /wheels /wheels
RUN pip install --quiet --no-deps /wheels/tuning_jobs-*.whl \
    && pip check && python -m jobs --help >/dev/null && rm -rf /wheels
WORKDIR /
USER 10001:10001
ENTRYPOINT ["python", "-m", "jobs"]
CMD ["run"]

FROM python AS engine
ARG TORCH=2.13.0
ARG TORCH_INDEX=cu130
# wandb lets a Job report to W&B; MLflow and TensorBoard need nothing. Trackio: ...,trackio
# For Hopper and Blackwell with long documents: ...,attention (flash-attn-4, 110 MB, not measured here yet)
ARG EXTRAS=train,serve,wandb
# NVIDIA's driver comes from the machine: the container toolkit reads the last two variables; GKE mounts it
# into /usr/local/nvidia, where neither the shell nor the loader looks by itself.
ENV PATH=$PATH:/usr/local/nvidia/bin LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Triton compiles its launchers when a kernel is first used: by a C compiler, with Python's headers.
RUN HEADER=$(python -c "import sysconfig; print(sysconfig.get_path('include'))")/Python.h; \
    if ! command -v gcc >/dev/null || ! test -f "$HEADER"; then apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends gcc libc6-dev \
       $(test -f "$HEADER" || echo python3-dev) \
    && test -f "$HEADER" && rm -rf /var/lib/apt/lists/*; fi
# Torch first and in a layer of its own: it is nine tenths of the image and changes least.
COPY tools/install_torch.py /src/tools/
RUN python tools/install_torch.py ${TORCH} ${TORCH_INDEX}
RUN python tools/install_locked.py ${EXTRAS}
COPY --from=wheel /wheels /wheels
RUN pip install --quiet --no-deps /wheels/tuning_jobs-*.whl \
    && pip check && python -m tuning --help >/dev/null && rm -rf /wheels
WORKDIR /
USER 10001:10001
ENTRYPOINT ["python", "-m", "tuning"]
