"""Airflow's pools for scarce devices."""

from __future__ import annotations

from dataclasses import dataclass

from trainyard.spec.kubernetes import DeviceKind, KubernetesSteps


@dataclass(frozen=True)
class Pool:
    """A pool; deferred tasks count, since their work goes on in a pod or process."""

    name: str
    slots: int
    description: str


LOCAL_POOL = Pool(
    "trainyard_local_devices",
    1,
    "Compiling and measuring on this machine: one at a time, or the figures are disturbed.",
)


def pods_pool(kind: DeviceKind, slots: int) -> Pool:
    """Return the pool of the pods that compute on a kind of device."""
    what = "no Neuron device" if kind == "cpu" else f"{kind} devices"
    return Pool(f"trainyard_pods_{kind}", slots, f"Pods that compile or measure on {what}.")


def pools_of(steps: KubernetesSteps | None) -> tuple[Pool, ...]:
    """Return the pools that Airflow needs.

    Args:
        steps: where heavy steps run as pods; None: they run on this machine.
    """
    if steps is None:
        return (LOCAL_POOL,)
    return (LOCAL_POOL, *(pods_pool(kind, slots) for kind, slots in steps.slots.items()))
