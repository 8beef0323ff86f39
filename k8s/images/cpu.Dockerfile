# Steps and servers of lane `cpu`, for clusters without Neuron devices.
#
#   docker build --file k8s/images/cpu.Dockerfile --build-arg BASE_DIGEST=sha256:… .
#
# BASE_DIGEST is that of `python:3.11-slim-bookworm`.
ARG BASE_IMAGE=python
ARG BASE_DIGEST
FROM ${BASE_IMAGE}@${BASE_DIGEST}

# TorchInductor compiles the model with g++ when it runs; vLLM's kernels are linked against libnuma.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /srv/trainyard

# Exactly what was tested, by hash. uv knows the index of PyTorch's builds for CPUs by name.
COPY requirements/tools.txt requirements/serve.txt requirements/
RUN python3 -m venv /srv/tools \
    && /srv/tools/bin/pip install --no-cache-dir --require-hashes --requirement requirements/tools.txt \
    && /srv/tools/bin/uv venv --python /usr/local/bin/python3 /srv/venv \
    && /srv/tools/bin/uv pip sync --no-cache --python /srv/venv --require-hashes --compile-bytecode \
         --torch-backend cpu requirements/serve.txt \
    && rm -r /srv/tools
ENV PATH=/srv/venv/bin:$PATH

COPY tasks tasks
ENV PYTHONPATH=/srv/trainyard/tasks \
    HOME=/home/trainyard
RUN python3 -m trainyard --version \
    && useradd --uid 10001 --create-home --home-dir /home/trainyard trainyard

# Kubernetes asks probes of its own, and most of what runs here is no server.
HEALTHCHECK NONE
CMD ["python3", "-m", "trainyard", "--help"]
USER 10001:10001
