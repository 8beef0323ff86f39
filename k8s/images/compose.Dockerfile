# Everything of ours for `docker-compose.yaml`: Airflow, and vLLM on the CPU in an environment of its own,
# since steps and servers run beside Airflow there, as on the embedded platform.
#
#   docker build --file k8s/images/compose.Dockerfile --build-arg BASE_DIGEST=sha256:… .
#
# BASE_DIGEST is that of `python:3.11-slim-bookworm`; `make pin-images` finds it.
ARG BASE_IMAGE=python
ARG BASE_DIGEST
FROM ${BASE_IMAGE}@${BASE_DIGEST}

# TorchInductor compiles the model with g++ when it runs; vLLM's kernels are linked against libnuma;
# health checks ask with curl.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /srv/trainyard

# Exactly what was tested, by hash, without what only developers need. uv knows the index of PyTorch's
# builds for CPUs by name.
COPY pyproject.toml ./
COPY requirements/tools.txt requirements/airflow.txt requirements/serve.txt requirements/
COPY k8s/images/select_lock.py k8s/images/select_lock.py
RUN python3 k8s/images/select_lock.py requirements/airflow.txt pyproject.toml airflow >/tmp/airflow.txt \
    && python3 -m venv /srv/tools \
    && /srv/tools/bin/pip install --no-cache-dir --require-hashes --requirement requirements/tools.txt \
    && /srv/tools/bin/uv venv --python /usr/local/bin/python3 /srv/airflow \
    && /srv/tools/bin/uv pip sync --no-cache --python /srv/airflow --require-hashes --compile-bytecode \
         /tmp/airflow.txt \
    && /srv/tools/bin/uv venv --python /usr/local/bin/python3 /srv/serve \
    && /srv/tools/bin/uv pip sync --no-cache --python /srv/serve --require-hashes --compile-bytecode \
         --torch-backend cpu requirements/serve.txt \
    && rm -r /srv/tools /tmp/airflow.txt

# Such as a provider for another executor, by name and version; none by default.
ARG EXTRA_PACKAGES=
RUN test -z "${EXTRA_PACKAGES}" \
    || /usr/local/bin/python3 -m pip --python /srv/airflow/bin/python3 install --no-cache-dir ${EXTRA_PACKAGES}

# Owned by root: nothing that runs here can change what runs here.
COPY tasks tasks
COPY plugins plugins
COPY dags dags
COPY k8s k8s
# Both environments find the code by a path file: servers get no variables of ours.
RUN echo /srv/trainyard/tasks | tee /srv/serve/lib/python3.11/site-packages/trainyard.pth \
      >/srv/airflow/lib/python3.11/site-packages/trainyard.pth \
    && echo /srv/trainyard/plugins >>/srv/airflow/lib/python3.11/site-packages/trainyard.pth \
    && useradd --uid 10001 --create-home --home-dir /home/trainyard trainyard \
    && install --directory --owner 10001 --group 10001 /srv/home /srv/logs
ENV PATH=/srv/airflow/bin:$PATH \
    HOME=/home/trainyard \
    AIRFLOW_HOME=/srv/home/airflow \
    TRAINYARD_HOME=/srv/home \
    TRAINYARD_CATALOGUE=/srv/trainyard/dags/models \
    TRAINYARD_ENVIRONMENTS=/srv/trainyard/dags/environments.yaml \
    TRAINYARD_MANIFESTS=/srv/trainyard/k8s \
    TRAINYARD_SERVE_PYTHON=/srv/serve/bin/python
RUN python3 -m trainyard --version \
    && python3 -c "import airflow, boto3, great_expectations, trainyard_airflow" \
    && /srv/serve/bin/python -c "import trainyard.lanes.cpu_server"

# The compose file has a check for each service.
HEALTHCHECK NONE
CMD ["python3", "-m", "trainyard", "--help"]
USER 10001:10001
