"""
### Release a model

Takes one revision of a model from its source to a published, signed release, and promotes it to
the environments you ask for.

**Steps.** `plan` says what will run and refuses bad input before any work starts. `download` stores
the checkpoint. For each target: `compile` makes the bundle, `measure` runs accuracy and load tests
on the real server, `accuracy_gate` and `latency_gate` turn figures into verdicts, `publish` signs;
`logit_validation` is skipped unless the spec asks for it. Where steps are pods, `check_tasks` first
asks the target's image about the accuracy tasks, before a device is taken.
Then one promotion for each environment, in order. Whatever exists already is reused, and says so.

**When it fails.** The task that failed gives the reason and what to do in its last log line.

| task | usual reason | what to do |
|---|---|---|
| `plan` | a mistake in the spec or the request | correct it, trigger a new run |
| `check_tasks` | no such accuracy task, or no data | correct the spec, trigger a new run |
| `compile` | no memory, or the compiler says no | read the log's tail; use less parallelism |
| `measure` | the server compiled in spite of its bundle | compile with this toolchain |
| `accuracy_gate`, `latency_gate` | it is not good enough | read the verdict |
| `promote.…` | the canary found a regression | read the task `settle` of the promotion |

Known failures of compilers, devices and nodes are told by name and tried again where that helps:
`docs/failures.md` has the table. Every task may be cleared and run again: finished work is found
and not repeated.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param, TaskGroup, TriggerRule, task_group

from trainyard.documents.plan import plan_id_of_run
from trainyard_airflow.dag_defaults import (
    DEFAULT_ARGS,
    RELEASE_STUCK_AFTER,
    START_DATE,
    Tag,
    environments,
    may_release,
    model_param,
    revision_param,
    steps_place,
    stuck_alert,
    wait_for_window_param,
)
from trainyard_airflow.notify import tell_gate_failed
from trainyard_airflow.permits import access_control
from trainyard_airflow.promote_operator import EnsurePromotionOperator
from trainyard_airflow.release_tasks import collect_releases, plan_targets
from trainyard_airflow.retries import STEP_RETRIES, STEP_RETRY_POLICY
from trainyard_airflow.step_operator import PlanOperator
from trainyard_airflow.step_tasks import device_groups, step_task

PLAN_ID = "{{ plan_id(params.model, dag.dag_id, run_id) }}"

STEP_ARGS = {
    "plan_id": PLAN_ID,
    "retries": STEP_RETRIES,
    "retry_policy": STEP_RETRY_POLICY,
}

with DAG(
    "neuron_release",
    dag_display_name="Neuron release",
    description="Take a revision of a model from its source to a signed release, and promote it.",
    doc_md=__doc__,
    schedule=None,
    start_date=START_DATE,
    catchup=False,
    # Devices are counted by pools. A run may wait for hours where it is to be promoted.
    max_active_runs=16,
    default_args=DEFAULT_ARGS,
    deadline=stuck_alert(RELEASE_STUCK_AFTER),
    tags=[Tag.TRAINYARD, Tag.RELEASE],
    access_control=access_control([may_release()]),
    render_template_as_native_obj=False,
    user_defined_macros={"plan_id": plan_id_of_run},
    params={
        "model": model_param(),
        "revision": revision_param(),
        "targets": Param(
            [],
            type="array",
            items={"type": "string"},
            title="Targets",
            description_md="Names of targets of the spec, one a line. Empty: all of them.",
            section="What",
        ),
        "overrides": Param(
            {},
            type="object",
            title="Changed settings",
            description_md="Settings of the targets that this release changes, for example "
            '`{"max_num_seqs": 4}`. The spec itself stays as it is.',
            section="What",
        ),
        "environments": Param(
            [],
            type="array",
            items={"type": "string", "enum": list(environments())},
            examples=list(environments()),
            title="Promote to",
            description_md="Environments to promote the release to, in the order of the "
            "environments file. Empty: publish only.",
            section="Where",
        ),
        "wait_for_window": wait_for_window_param(),
        "accept_unproven": Param(
            False,
            type="boolean",
            title="Accept what is unproven",
            description_md="Go on although nobody has proven the image, instance and lane of a "
            "Neuron target with *trainyard doctor neuron*. Otherwise *production* refuses it.",
            section="Where",
        ),
    },
):
    plan = PlanOperator(
        task_id="plan",
        task_display_name="Plan",
        plan_id=PLAN_ID,
        retries=STEP_RETRIES,
        retry_policy=STEP_RETRY_POLICY,
        doc_md="Say what this release will do and refuse bad input before any work starts.",
    )
    download = step_task(
        task_id="download",
        task_display_name="Download",
        step="download",
        interpreter="serve",
        execution_timeout=timedelta(hours=12),
        doc_md="Store the checkpoint: every file hashed on the way, the manifest last.",
        **STEP_ARGS,
    )

    def release_target(target: str, pool: str) -> None:
        """Everything that one target needs to become a release."""
        compile_bundle = step_task(
            task_id="compile",
            task_display_name="Compile",
            step="compile",
            target=target,
            interpreter="serve",
            pool=pool,
            execution_timeout=timedelta(hours=6),
            # Skipped is only what nobody needs.
            trigger_rule=TriggerRule.NONE_FAILED,
            map_index_template="{{ task.target }}",
            doc_md="Compile for the target, or find a bundle with the same compile key.",
            **STEP_ARGS,
        )
        measure = step_task(
            task_id="measure",
            task_display_name="Measure",
            step="measure",
            target=target,
            interpreter="serve",
            pool=pool,
            execution_timeout=timedelta(hours=6),
            map_index_template="{{ task.target }}",
            doc_md="Start the server from its bundle, prove that it did, and measure accuracy and "
            "latency.",
            **STEP_ARGS,
        )
        logits = step_task(
            task_id="logit_validation",
            task_display_name="Logit validation (not the served graph)",
            step="logits",
            target=target,
            interpreter="serve",
            optional=True,
            pool=pool,
            execution_timeout=timedelta(hours=8),
            map_index_template="{{ task.target }}",
            doc_md="AWS's logit validation of the checkpoint on a device, where the spec asks for "
            "it. It decides nothing: the report shows it beside the release.",
            **STEP_ARGS,
        )
        gates = [
            step_task(
                task_id=f"{gate}_gate",
                step="gate",
                arguments=("--gate", gate),
                status_name=f"{gate}-gate",
                target=target,
                map_index_template="{{ task.target }}",
                on_failure_callback=tell_gate_failed,
                task_display_name=f"{gate.capitalize()} gate",
                doc_md=f"Judge the {gate} figures by the spec's bounds and the stable release.",
                **STEP_ARGS,
            )
            for gate in ("accuracy", "latency")
        ]
        publish = step_task(
            task_id="publish",
            task_display_name="Publish",
            step="publish",
            target=target,
            map_index_template="{{ task.target }}",
            doc_md="Derive the verdicts again, then sign and store the release.",
            **STEP_ARGS,
        )
        if steps_place() is not None:
            # The plan is made elsewhere than in the image that measures, and could not ask it.
            asked = step_task(
                task_id="check_tasks",
                task_display_name="Check accuracy tasks",
                step="tasks",
                target=target,
                optional=True,
                execution_timeout=timedelta(hours=1),
                map_index_template="{{ task.target }}",
                doc_md="Ask the harness in the target's image about its own accuracy tasks, before "
                "a device is taken.",
                **STEP_ARGS,
            )
            asked >> compile_bundle
        compile_bundle >> measure >> gates >> publish
        measure >> logits

    releases = collect_releases(PLAN_ID)
    plan >> download
    # Devices are counted by their kind, so each kind has its own group: one, if steps run here.
    for group in device_groups():
        targets = plan_targets.override(task_id=group.targets_id)(PLAN_ID, group.kind)
        release = task_group(group_id=group.group_id)(release_target)
        plan >> targets
        download >> release.partial(pool=group.pool).expand(target=targets) >> releases

    with TaskGroup("promote", tooltip="One promotion for each environment asked for, in order."):
        before = releases
        for environment in environments():
            promotion = EnsurePromotionOperator(
                task_id=environment,
                task_display_name=f"Promote to {environment}",
                environment=environment,
                plan_id=PLAN_ID,
                trigger_rule=TriggerRule.NONE_FAILED,
                retries=STEP_RETRIES,
                retry_policy=STEP_RETRY_POLICY,
                doc_md=f"Start `neuron_promote__{environment}` or attach to it, and wait.",
            )
            before >> promotion
            before = promotion
