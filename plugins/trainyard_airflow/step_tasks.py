"""The one factory of heavy steps: processes of the worker, or pods, as the environments file says.

A DAG file reads the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainyard.kubernetes.step_pod import POD_STEPS
from trainyard.platform.pools import LOCAL_POOL, pods_pool
from trainyard.spec.kubernetes import KubernetesSteps
from trainyard_airflow.dag_defaults import steps_place
from trainyard_airflow.pod_operator import PodStepOperator
from trainyard_airflow.step_operator import StepOperator


@dataclass(frozen=True)
class DeviceGroup:
    """The targets that compute on one kind of device, and what counts its devices."""

    kind: str
    """Empty: every kind."""
    group_id: str
    targets_id: str
    """Id of the task that lists them."""
    pool: str


def step_task(*, step: str, **arguments: Any) -> StepOperator:
    """Return the task that runs a step.

    Args:
        step: name of the step.
        arguments: as of `StepOperator`.
    """
    place = steps_place()
    operator = PodStepOperator if place is not None and is_pod(step, place) else StepOperator
    return operator(step=step, **arguments)


def is_pod(step: str, place: KubernetesSteps) -> bool:
    """Does a step run as a pod in this place?

    Small steps do only where the environments file gives them a service account of their own: then
    their rights on the store are not Airflow's.
    """
    return step in POD_STEPS or step in place.service_accounts


def device_groups() -> tuple[DeviceGroup, ...]:
    """Return the groups of targets of a release, each with the pool of its devices."""
    place = steps_place()
    if place is None:
        return (DeviceGroup("", "target", "plan_targets", LOCAL_POOL.name),)
    return tuple(
        DeviceGroup(kind, f"target_{kind}", f"targets_{kind}", pods_pool(kind, slots).name)
        for kind, slots in place.slots.items()
    )
