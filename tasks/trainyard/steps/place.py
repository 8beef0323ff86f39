"""Can the steps of a plan run as pods in a place? Asked before the plan is stored."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from trainyard.documents.plan import Plan
from trainyard.errors import BadInput
from trainyard.kubernetes.step_env import step_environment
from trainyard.kubernetes.step_pod import POD_STEPS, StepWork, step_pod
from trainyard.kubernetes.step_size import kind_of
from trainyard.settings import Settings
from trainyard.spec.kubernetes import KubernetesSteps


def pod_problems(
    plan: Plan, place: KubernetesSteps, settings: Settings, *, now: datetime
) -> Iterator[str]:
    """Yield why pods of the plan cannot do what is to be done, each as sentences.

    Only steps whose output does not exist yet count.
    """
    for planned in plan.targets:
        target = planned.target
        kind = kind_of(target)
        if kind not in place.slots:
            known = ", ".join(place.slots)
            yield (
                f"Target {target.name}: it computes on {kind}, which steps.slots of the "
                f"environments file does not name ({known}). Add it with the number of pods that "
                "may use such devices at a time."
            )
    for step in plan.steps:
        if step.exists or step.step not in POD_STEPS:
            continue
        work = StepWork(
            step.step,
            plan.plan_id,
            plan.spec.model,
            plan.target(step.target).target if step.target else None,
            checkpoint_bytes=plan.checkpoint_bytes,
            reference_gib=plan.gib_beside(step.step),
        )
        env = step_environment(settings, step=step.step, dag_run="", requested_by="")
        try:
            step_pod(work, place, env=env, now=now)
        except BadInput as error:
            yield f"{f'Target {step.target}: ' if step.target else ''}{error}"
