"""What a step's pod asks for: devices, memory, processors, disk, and the time it may need.

Classes go by the size of the checkpoint, because the size of a model says most about what compiling
and serving it takes. The numbers are requests: a device pod may use more of its node if nobody else
does, so there is no limit of memory to be killed at while the node has some left.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from trainyard.lanes.neuron_common import chips_needed, lnc_of
from trainyard.lanes.neuron_support import INSTANCES, Instance, family_of
from trainyard.spec.kubernetes import DeviceKind
from trainyard.spec.model import Target

GIB = 1 << 30
NODE_SHARE = 0.85
"""Of a node's memory that pods may ask for; the rest is for the system, kubelet and daemons."""
MAX_MEMORY_FACTOR = 4
DEVICE_STEPS = frozenset({"compile", "measure", "logits"})
"""Steps that start a target's engine."""
GIB_A_CPU = 16
"""Memory for each CPU that is asked for: every Neuron instance has more CPUs than that."""


@dataclass(frozen=True)
class SizeClass:
    """What models of up to some size take."""

    name: str
    checkpoint_gb: float
    """10**9 bytes that a checkpoint of this class has at most."""
    memory_gib: int
    """Of the machine, to compile or to serve it."""
    compile_h: float
    """Hours that a compile from empty caches may need."""
    measure_h: float


CLASSES = (
    SizeClass("small", 6, 32, 1.0, 1.0),
    SizeClass("medium", 20, 96, 2.0, 2.0),
    SizeClass("large", 80, 192, 4.0, 3.0),
    SizeClass("huge", float("inf"), 384, 4.0, 4.0),
)
"""Sources: neuronx-cc takes 10 to 40 GB in each process and was seen with 107 to 175 GB; models of
8B parameters (16 GB) do not compile on machines with 16 or 32 GB; compiles take 5 to 20 minutes for
small models, up to 2 h for 8B and 4 h for 70B with room to spare (aws-neuron-sdk #706,
nki-samples #87, aws-neuron-samples #10; published times of vLLM Neuron and optimum-neuron)."""


@dataclass(frozen=True)
class Devices:
    """The devices of one pod."""

    instance: Instance
    chips: int
    lnc: int

    @property
    def whole_node(self) -> bool:
        """Does the pod take all devices of its node?"""
        return self.chips >= self.instance.chips


@dataclass(frozen=True)
class StepSize:
    """What one pod asks for."""

    cpus: int
    memory_gib: int
    disk_gib: int
    """Of the node's disk: the checkpoint, caches, logs."""
    shm_gib: int
    """Shared memory; 0: what every container has (64 MiB)."""
    needed_s: float
    """Seconds that the work may need, without waiting for a node."""


def kind_of(target: Target) -> DeviceKind:
    """Return what a target computes on. Its compiler may need less: it is counted there too."""
    return family_of(target.instance) or "cpu"


def class_of(checkpoint_bytes: int) -> SizeClass:
    """Return the size class of a checkpoint."""
    return next(each for each in CLASSES if checkpoint_bytes <= each.checkpoint_gb * 1e9)


def devices_of(step: str, target: Target | None) -> Devices | None:
    """Return the devices that a step takes for a target, None if it needs none."""
    if step not in DEVICE_STEPS or target is None or target.neuron is None:
        return None
    if step == "compile" and target.neuron.compile_on == "cpu":
        return None
    return Devices(INSTANCES[target.instance], chips_needed(target), lnc_of(target))


def size_of(
    step: str,
    target: Target | None,
    *,
    checkpoint_bytes: int,
    work_gib: int,
    reference_gib: float = 0.0,
    out_of_memory: int = 0,
) -> StepSize:
    """Return what the pod of a step asks for.

    Args:
        step: its name.
        target: that it works for, if for one.
        checkpoint_bytes: size of the model's files; 0 if unknown.
        work_gib: disk for compiling and measuring, at least.
        reference_gib: memory that the parity reference takes while the server holds its own, or
            the goldens of step `logits`.
        out_of_memory: how often it ran out of memory before.
    """
    if step not in DEVICE_STEPS or target is None:
        # The checkpoint streams through; data sets, expectations and signatures are small.
        gib = {"download": 4, "tasks": 4, "gate": 3}.get(step, 2)
        return StepSize(1, _more(gib, out_of_memory), 4, 0, 3600.0)
    size = class_of(checkpoint_bytes)
    checkpoint_gib = checkpoint_bytes / GIB
    beside = 0 if step == "compile" else ceil(reference_gib)
    if target.neuron is None:
        # vLLM on the CPU holds the weights and the KV cache in the machine's memory.
        own = 4 + int(2 * checkpoint_gib + target.kv_cache_gib)
    else:
        own = size.memory_gib
    devices = devices_of(step, target)
    memory = _capped(_more(own + beside, out_of_memory), devices)
    server = _capped(_more(own, out_of_memory), devices)
    return StepSize(
        cpus=max(1, memory // GIB_A_CPU),
        memory_gib=memory,
        # The checkpoint beside the caches of the compiler, which leaves intermediates behind.
        disk_gib=max(work_gib, int(1.3 * checkpoint_gib) + 1),
        shm_gib=1 if target.neuron is None else min(64, max(8, server // 4)),
        # Step `logits` compiles as well.
        needed_s=3600.0 * (size.measure_h if step == "measure" else size.compile_h),
    )


def host_gib(target: Target) -> float | None:
    """Return the memory in GiB that a pod with a target's devices can have; None: nobody knows."""
    devices = devices_of("measure", target)
    if devices is None or devices.instance.host_memory_gib is None:
        return None
    share = min(1.0, devices.chips / devices.instance.chips)
    return devices.instance.host_memory_gib * NODE_SHARE * share


def _more(gib: int, out_of_memory: int) -> int:
    return gib * min(MAX_MEMORY_FACTOR, 1 << min(out_of_memory, 8))


def _capped(gib: int, devices: Devices | None) -> int:
    """Return what a node can give to a pod with that share of its devices."""
    if devices is None or devices.instance.host_memory_gib is None:
        return gib
    share = min(1.0, devices.chips / devices.instance.chips)
    return max(1, min(gib, int(devices.instance.host_memory_gib * NODE_SHARE * share)))
