"""What each lane can do of what the behaviour checks ask for.

A row that says `unsupported` turns what its check finds into a warning that the release carries, so
there is one only where a server is known to leave something out and answers well otherwise. What is
known to go wrong in some versions has no such row: it is measured, and stops a release.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from trainyard.documents.behaviour import Capability
from trainyard.spec.model import BehaviourName, Target

EXACT = Capability()

_CPU_SHAPES = Capability(
    ability="tolerance",
    why="Matrix kernels may round differently for other numbers of rows.",
    source="The demonstration model showed no difference at all (vLLM 0.32, x86-64).",
)
_CPU: Mapping[BehaviourName, Capability] = MappingProxyType(
    {
        "batching": _CPU_SHAPES,
        "concurrency": _CPU_SHAPES,
        "prefix_cache": _CPU_SHAPES,
        "penalties": Capability(
            ability="tolerance",
            why="What a penalty must change is worked out from rounded log-probabilities.",
        ),
    }
)

_GRAPHS = Capability(
    ability="tolerance",
    why="Each batch size and length has a compiled graph of its own, which rounds in its own way.",
    source="AWS Neuron SDK 2.32, vllm-neuron/docs/guides/reference-configuration.md (buckets)",
)
_NEURON: Mapping[BehaviourName, Capability] = MappingProxyType(
    {
        "batching": _GRAPHS,
        "concurrency": _GRAPHS,
        "prefix_cache": _GRAPHS,
        "penalties": _GRAPHS,
        "stop_strings": _GRAPHS,
        "streaming": _GRAPHS,
        "cancellation": _GRAPHS,
    }
)

_NXDI_PENALTIES = Capability(
    ability="unsupported",
    why="Sampling on the device ignores presence and repetition penalties without a word.",
    source="vllm-neuron plugin 0.2 README (lane neuron-nxdi)",
)


def of_cpu(name: BehaviourName) -> Capability:
    """Return what lane `cpu` can do of one thing."""
    return _CPU.get(name, EXACT)


def of_neuron(name: BehaviourName) -> Capability:
    """Return what both Neuron lanes can do of one thing."""
    return _NEURON.get(name, EXACT)


def of_nxdi(name: BehaviourName, target: Target) -> Capability:
    """Return what lane `neuron-nxdi` can do of one thing with a target's settings."""
    config = target.nxdi.override_neuron_config if target.nxdi else None
    if name == "penalties" and config and config.on_device_sampling_config is not None:
        return _NXDI_PENALTIES
    return of_neuron(name)
