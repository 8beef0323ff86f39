# Airflow with Trainyard's DAGs, plugin and domain. The guard, the proxy and garbage collection run in
# it as well, and so do the steps that need no engine (download, gate, publish).
#
#   docker build --file k8s/images/airflow.Dockerfile --build-arg BASE_DIGEST=sha256:… .
#
# BASE_DIGEST is that of the official image `slim-3.3.2-python3.11`: without providers, since the lock
# brings those that are used.
ARG BASE_IMAGE=apache/airflow
ARG BASE_DIGEST
FROM ${BASE_IMAGE}@${BASE_DIGEST}

WORKDIR /srv/trainyard

# Exactly what was tested, by hash, without what only developers need.
COPY pyproject.toml ./
COPY requirements/airflow.txt requirements/airflow.txt
COPY k8s/images/select_lock.py k8s/images/select_lock.py
RUN python3 k8s/images/select_lock.py requirements/airflow.txt pyproject.toml airflow >/tmp/airflow.txt \
    && python3 -m pip install --no-cache-dir --no-deps --require-hashes --requirement /tmp/airflow.txt \
    && python3 -m pip check \
    && rm /tmp/airflow.txt

# Owned by root: nothing that runs here can change what runs here.
COPY tasks tasks
COPY plugins plugins
COPY dags dags
COPY k8s k8s
ENV PYTHONPATH=/srv/trainyard/tasks:/srv/trainyard/plugins \
    PYTHONDONTWRITEBYTECODE=1 \
    TRAINYARD_CATALOGUE=/srv/trainyard/dags/models \
    TRAINYARD_ENVIRONMENTS=/srv/trainyard/dags/environments.yaml \
    TRAINYARD_MANIFESTS=/srv/trainyard/k8s

# It starts, and has what its parts import only when they run.
RUN python3 -m trainyard --version \
    && python3 -c "import airflow, boto3, great_expectations, kubernetes, trainyard_airflow"

# Kubernetes asks probes of its own.
HEALTHCHECK NONE
USER 50000:0
