"""Runs one step of a release as a pod.

Airflow's own KubernetesPodOperator does what it does well (create, defer, follow the log, find the
pod again after a worker died). This operator says which pod that is, and what its end means: the
store knows whether the step is done, the status document and the pod say why it is not. The other
operator is made when a task runs, so that DAG files need not import it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException, TaskDeferred

from trainyard.kubernetes.step_pod import HOSTNAME, POD_STEPS
from trainyard_airflow.exceptions import (
    StepDefect,
    StepOutcome,
    StepTransient,
    outcome_exception,
)
from trainyard_airflow.hub_credentials import SOURCE_STEPS, hub_credentials
from trainyard_airflow.identity import requested_by
from trainyard_airflow.step_operator import StepOperator

if TYPE_CHECKING:
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator

    from trainyard.documents.plan import Plan
    from trainyard.documents.status import StepStatus
    from trainyard.kubernetes.client import Cluster, Object
    from trainyard.settings import Settings
    from trainyard.spec.kubernetes import KubernetesSteps
    from trainyard.store.protocol import Store

POLL_S = 15.0
"""Seconds between two looks at a running pod; the work takes minutes to hours."""
START_CHECK_S = 5
"""Seconds between two looks at a pod that has not started."""
LOG_S = 60
"""Seconds between two readings of a running pod's log."""
REDEFERS = 3
"""How often the provider goes on by itself after its trigger failed."""
KEEP_FAILED = timedelta(days=1)
"""How long a failed pod can be looked at before another step of ours removes it."""
CLOCKS_S = 5.0
"""Seconds that the clocks of the cluster and of its pods may differ."""
FROM_OUTSIDE = frozenset({"spot-interruption", "preempted", "node-gone", "evicted", "deadline"})
"""Failures that end a step by SIGTERM: its own last words know less than its pod."""
BAD_NODE = frozenset({"device-fault", "device-hang", "no-device", "devices-busy"})
"""Failures after which the next try must go to another node."""
AVOIDED = "trainyard_avoided_nodes"
"""Where a task remembers those nodes for its next tries."""


class PodStepOperator(StepOperator):
    """Run `trainyard STEP` in a pod of the place that the environments file names.

    What is in the store already is found here, without a pod and without waiting for devices.

    Args: as of `StepOperator`; `interpreter` is only for steps that need no pod.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._inner: KubernetesPodOperator | None = None

    def run_step(self, context: Context) -> str:
        """Create the pod, or find the one of an earlier try, and wait for it in the triggerer."""
        from trainyard.settings import get_settings
        from trainyard_airflow.aws_connection import open_task_store

        if self.target:
            context["target"] = self.target  # type: ignore[typeddict-unknown-key]
        settings = get_settings()
        with outcomes():
            store = open_task_store(settings)
            plan = _read_plan(store, self.plan_id)
            if self._needs_no_pod(plan, store):
                return super().run_step(context)
            place, cluster = _place(settings)
            self._sweep(cluster, place)
            manifest = self._manifest(plan, store, place, settings, cluster, context)
        since = datetime.now(UTC)
        self._inner = self._pod_operator(settings, place, manifest)
        try:
            with api_outcomes(f"The pod of step {self.step}"):
                self._inner.execute_async(context)
        except TaskDeferred as deferred:
            name, since = _identity(self._inner.pod, since)
            self._give_secret(cluster, place, context, name)
            self._wait(deferred, since=since.isoformat(), pod=name)
        except StepOutcome:
            raise
        except AirflowException as error:
            if self._inner.pod is None:
                raise StepDefect(f"No pod was created or found: {error}") from error
            # It found the pod of an earlier try, which had failed.
            self.log.warning("%s", error)
        name, since = _identity(self._inner.pod, since)
        return self._outcome(context, name, since=since, looked=None, timed_out=False)

    def resume(self, context: Context, event: dict[str, Any], since: str, pod: str) -> str:
        """Go on when the pod has ended, or cannot be waited for any longer."""
        with self.reported(context):
            return self._go_on(context, event, since, pod)

    def _go_on(self, context: Context, event: dict[str, Any], since: str, pod: str) -> str:
        from trainyard.settings import get_settings

        settings = get_settings()
        with outcomes():
            place, cluster = _place(settings)
            # Now: what follows removes the pod.
            looked = _look(cluster, place, pod)
        if (
            event["status"] == "error"
            and _is_active(looked[0])
            and event.get("_redefer_count", 0) >= REDEFERS
        ):
            # The provider would wait here for hours. The pod is well; the next try finds it.
            raise StepTransient(f"Pod {pod} runs, but cannot be followed: {event.get('message')}")
        self._inner = self._pod_operator(settings, place, None)
        try:
            with api_outcomes(f"Pod {pod}"):
                self._inner.trigger_reentry(context, event)
        except TaskDeferred as deferred:
            self._wait(deferred, since=since, pod=pod)
        except StepOutcome:
            raise
        except AirflowException as error:
            self.log.info("The pod's end: %s", error)
        return self._outcome(
            context,
            pod,
            since=datetime.fromisoformat(since),
            looked=looked,
            timed_out=event["status"] == "timeout",
        )

    def on_kill(self) -> None:
        """Remove the pod when a person ends the task; a deferred one is removed by its trigger."""
        if self._inner is not None:
            self._inner.on_kill()
        super().on_kill()

    def _wait(self, deferred: TaskDeferred, *, since: str, pod: str) -> NoReturn:
        self.defer(
            trigger=deferred.trigger,
            method_name="resume",
            kwargs={"since": since, "pod": pod},
            timeout=deferred.timeout,
        )
        raise AssertionError("defer raises")

    def _needs_no_pod(self, plan: Plan, store: Store) -> bool:
        if self.step == "download" and plan.spec.source.kind == "local":
            self.log.info("The source is a folder of this machine: no pod would see it.")
            return True
        found = self.step in POD_STEPS and any(
            planned.step == self.step
            and planned.target == self.target
            and store.exists(planned.key)
            for planned in plan.steps
        )
        if found:
            self.log.info("The output is in the store: no pod is needed.")
        return found

    def _manifest(
        self,
        plan: Plan,
        store: Store,
        place: KubernetesSteps,
        settings: Settings,
        cluster: Cluster,
        context: Context,
    ) -> Object:
        """Return the pod's manifest, with what it names in the cluster made."""
        from trainyard.kubernetes.kinds import CLAIM_TEMPLATE, SECRET
        from trainyard.kubernetes.step_env import check_signing, step_environment
        from trainyard.kubernetes.step_pod import (
            StepWork,
            claim_template,
            secret_object,
            step_pod,
        )
        from trainyard.steps.compile import planned_target
        from trainyard.steps.status import read_status

        status = read_status(store, self.plan_id, self.status_name, self.target)
        earlier = status.tuning if status is not None and status.state != "done" else {}
        work = StepWork(
            step=self.step,
            plan_id=self.plan_id,
            model=plan.spec.model,
            target=planned_target(plan, self.target).target if self.target else None,
            arguments=tuple(self.arguments),
            checkpoint_bytes=plan.checkpoint_bytes,
            reference_gib=plan.gib_beside(self.step),
            out_of_memory=earlier.get("out_of_memory", 0),
            avoided_nodes=_avoided(context),
            **(
                {"limit_s": self.execution_timeout.total_seconds()}
                if self.execution_timeout is not None
                else {}
            ),
        )
        secrets = self._secrets(settings)
        name = self._secret_name(context) if secrets else ""
        env = step_environment(
            settings,
            step=self.step,
            dag_run=f"{context['dag'].dag_id}/{context['run_id']}",
            requested_by=requested_by(context),
        )
        if self.step == "publish":
            check_signing({**env, **place.env}, secrets=bool(place.env_from_secrets))
        manifest = step_pod(work, place, env=env, secret=name, now=datetime.now(UTC))
        if secrets:
            cluster.apply(SECRET, secret_object(name, place, secrets))
        if work.devices is not None and place.devices == "dra":
            cluster.apply(CLAIM_TEMPLATE, claim_template(work.devices, place))
        return manifest

    def _secrets(self, settings: Settings) -> dict[str, str]:
        """Return the variables of Airflow's connections, which no manifest may hold."""
        from trainyard_airflow.aws_connection import connection_environment

        found = connection_environment(settings)
        if self.step in SOURCE_STEPS:
            found |= hub_credentials(settings.hub_connection)
        return found

    def _secret_name(self, context: Context) -> str:
        from trainyard.kubernetes.step_pod import secret_name

        run = f"{context['dag'].dag_id}/{context['run_id']}"
        return secret_name(run, f"{self.task_id}/{self.target}")

    def _give_secret(
        self, cluster: Cluster, place: KubernetesSteps, context: Context, pod: str
    ) -> None:
        """Let the Secret of this task go when its pod goes."""
        from trainyard.errors import TrainyardError
        from trainyard.kubernetes.kinds import POD, SECRET

        try:
            name = self._secret_name(context)
            found = cluster.get(POD, pod, place.namespace)
            if found is None or cluster.get(SECRET, name, place.namespace) is None:
                return
            owner = {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": pod,
                "uid": found["metadata"]["uid"],
            }
            body = {"metadata": {"ownerReferences": [owner]}}
            cluster.merge_patch(SECRET, name, body, namespace=place.namespace)
        except TrainyardError as error:
            # It is removed with the task's end, too.
            self.log.warning("The pod's Secret has no owner: %s", error)

    def _pod_operator(
        self, settings: Settings, place: KubernetesSteps, manifest: Object | None
    ) -> KubernetesPodOperator:
        from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator

        from trainyard.kubernetes.client import in_cluster
        from trainyard.kubernetes.step_pod import CONTAINER, GRACE_S

        kubeconfig = settings.kubeconfig
        inside = kubeconfig is None and not place.context and in_cluster()
        if kubeconfig is None and not inside:
            kubeconfig = Path(os.environ.get("KUBECONFIG") or "~/.kube/config").expanduser()
        return KubernetesPodOperator(
            task_id=self.task_id,
            execution_timeout=self.execution_timeout,
            kubernetes_conn_id=None,
            config_file=str(kubeconfig) if kubeconfig is not None else None,
            in_cluster=inside or None,
            cluster_context=place.context or None,
            namespace=place.namespace,
            pod_template_dict=manifest,
            base_container_name=CONTAINER,
            # The result is in the store; a sidecar for XCom can lose it (airflow #72821, #73117).
            do_xcom_push=False,
            deferrable=True,
            durable=True,
            schedule_timeout_seconds=int(place.schedule_timeout_s),
            startup_timeout_seconds=int(place.startup_timeout_s),
            startup_check_interval_seconds=START_CHECK_S,
            poll_interval=POLL_S,
            get_logs=True,
            logging_interval=LOG_S,
            log_events_on_startup=False,
            log_events_on_failure=True,
            log_pod_spec_on_failure=False,
            on_finish_action="delete_succeeded_pod",
            on_kill_action="delete_pod",
            termination_grace_period=GRACE_S,
            termination_message_policy="FallbackToLogsOnError",
        )

    def _outcome(
        self,
        context: Context,
        pod: str,
        *,
        since: datetime,
        looked: tuple[Object | None, Object | None] | None,
        timed_out: bool,
    ) -> str:
        """Return the key of what the step made, or raise what its end means."""
        from trainyard.settings import get_settings
        from trainyard.steps.status import read_status
        from trainyard_airflow.aws_connection import open_task_store

        settings = get_settings()
        with outcomes():
            place, cluster = _place(settings)
            before, node = looked if looked is not None else _look(cluster, place, pod)
            store = open_task_store(settings)
            status = read_status(store, self.plan_id, self.status_name, self.target)
            self._clear(cluster, place, pod, before, context)
            if status is not None and status.state == "done" and store.exists(status.output_key):
                return status.output_key
            since -= timedelta(seconds=CLOCKS_S)
            own = status if status is not None and status.started_at >= since else None
            ended = self._end(store, own, before, node, since=since, timed_out=timed_out)
            if ended is not None and ended.code in BAD_NODE and node is not None:
                self._avoid(node, context)
            raise self._failure(ended, before)

    def _end(
        self,
        store: Store,
        status: StepStatus | None,
        pod: Object | None,
        node: Object | None,
        *,
        since: datetime,
        timed_out: bool,
    ) -> StepStatus | None:
        """Return the status document that says why the pod ended, if anything says it.

        Args:
            store: where a step that was killed gets its last words.
            status: what this pod's step said.
            pod: as it was at its end.
            node: the pod's.
            since: what was said before is not about this pod.
            timed_out: it was not waited for any longer.
        """
        from trainyard.failures.recognise import container_exit_code, recognise_pod
        from trainyard.settings import get_settings
        from trainyard.steps.after_failure import record_killed

        if container_exit_code(pod) is None and timed_out and _phase(pod) == "Running":
            pod = {"status": {"reason": "DeadlineExceeded", "message": "its task ended"}}
        known = recognise_pod(pod, node)
        spoke = status is not None and status.state == "failed"
        if known is None or (spoke and not _knows_better(known.code, status)):
            return status if spoke else None
        return record_killed(
            store,
            get_settings(),
            _read_plan(store, self.plan_id),
            self.status_name,
            self.target,
            known,
            since=since,
        )

    def _failure(self, status: StepStatus | None, pod: Object | None) -> StepOutcome:
        """Return the exception for the end of a step that is not done."""
        from trainyard.failures.recognise import container_exit_code

        if status is not None and status.exit_code is not None:
            message = f"{status.reason} {status.hint}".strip()
            return outcome_exception(status.exit_code)(message, code=status.code)
        exit_code = container_exit_code(pod)
        message = f"Step {self.step} ended with exit code {exit_code} and left no report."
        return (outcome_exception(exit_code) if exit_code is not None else StepDefect)(message)

    def _avoid(self, node: Object, context: Context) -> None:
        """Remember a node that the next tries of this task must not go to."""
        metadata = node["metadata"]
        host = (metadata.get("labels") or {}).get(HOSTNAME) or metadata["name"]
        hosts: list[Any] = sorted({*_avoided(context), str(host)})
        context["task_state_store"].set(AVOIDED, hosts)
        self.log.info("The next tries avoid node %s.", host)

    def _clear(
        self,
        cluster: Cluster,
        place: KubernetesSteps,
        name: str,
        pod: Object | None,
        context: Context,
    ) -> None:
        """Remove what the end of the task leaves: the Secret, and a pod that still waits or runs.

        The provider keeps a pod that waits for a node: it would begin beside the next try's.
        """
        from trainyard.errors import TrainyardError
        from trainyard.kubernetes.kinds import POD, SECRET

        try:
            if _is_active(pod):
                cluster.delete(POD, name, place.namespace)
            if self._secrets_may_exist():
                cluster.delete(SECRET, self._secret_name(context), place.namespace)
        except TrainyardError as error:
            self.log.warning("Something is left in the cluster: %s", error)

    def _secrets_may_exist(self) -> bool:
        from trainyard.settings import get_settings

        settings = get_settings()
        return bool(settings.aws_connection or settings.hub_connection)

    def _sweep(self, cluster: Cluster, place: KubernetesSteps) -> None:
        """Remove pods of steps that failed long ago and were kept to be looked at.

        Raises:
            Transient: the cluster does not answer.
        """
        from trainyard.errors import BadInput
        from trainyard.kubernetes.kinds import POD
        from trainyard.kubernetes.labels import owned

        try:
            pods, _ = cluster.list(POD, place.namespace, labels=owned("step"))
            for pod in pods:
                if not _is_active(pod) and datetime.now(UTC) - _ended_at(pod) > KEEP_FAILED:
                    cluster.delete(POD, pod["metadata"]["name"], place.namespace)
        except BadInput as error:
            self.log.warning("Old pods were not removed: %s", error)


@contextmanager
def outcomes() -> Iterator[None]:
    """Turn our errors into the exceptions that Airflow's retry policy knows."""
    from trainyard.errors import TrainyardError

    try:
        yield
    except TrainyardError as error:
        raise outcome_exception(error.exit_code)(str(error), code=error.code) from error


@contextmanager
def api_outcomes(what: str) -> Iterator[None]:
    """Turn what the cluster's API refused the provider into our exceptions."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    from trainyard.kubernetes.client import api_error

    try:
        yield
    except ApiException as error:
        meant = api_error(error, what)
        raise outcome_exception(meant.exit_code)(str(meant), code=meant.code) from error
    except HTTPError as error:
        raise StepTransient(f"{what}: the cluster does not answer: {error}") from error


def _place(settings: Settings) -> tuple[KubernetesSteps, Cluster]:
    """Return where steps run, and the cluster."""
    from trainyard.errors import BadInput
    from trainyard.kubernetes.client import Cluster
    from trainyard.spec.loader import load_environments

    place = load_environments(settings.environments).steps
    if place is None:
        raise BadInput(
            "The environments file names no place for pods any more.",
            hint="Clear the task: it then runs as a process of the worker.",
        )
    return place, Cluster.connect(settings, place.context)


def _read_plan(store: Store, plan_id: str) -> Plan:
    from trainyard.documents.plan import Plan
    from trainyard.store.documents import read_document
    from trainyard.store.layout import plan_key

    return read_document(store, plan_key(plan_id), Plan)


def _look(
    cluster: Cluster, place: KubernetesSteps, name: str
) -> tuple[Object | None, Object | None]:
    """Return a pod and its node, as far as there are any and we may see them."""
    from trainyard.errors import BadInput
    from trainyard.kubernetes.kinds import NODE, POD

    pod = cluster.get(POD, name, place.namespace) if name else None
    node_name = ((pod or {}).get("spec") or {}).get("nodeName")
    if not node_name:
        return pod, None
    try:
        return pod, cluster.get(NODE, node_name)
    except BadInput:
        # No right to read nodes: the pod alone says less.
        return pod, None


def _phase(pod: Object | None) -> str:
    return str(((pod or {}).get("status") or {}).get("phase", ""))


def _avoided(context: Context) -> tuple[str, ...]:
    """Return the host names of the nodes that this task must not go to."""
    kept = context["task_state_store"].get(AVOIDED)
    return tuple(map(str, kept)) if isinstance(kept, list) else ()


def _identity(pod: Any, now: datetime) -> tuple[str, datetime]:
    """Return the name of a pod of the provider, and when it was made (now, if just now)."""
    if pod is None:
        return "", now
    return str(pod.metadata.name), pod.metadata.creation_timestamp or now


def _knows_better(code: str, status: StepStatus | None) -> bool:
    """Does a failure of the pod explain more than what the step said itself?"""
    if code == "device-fault":
        return True
    # A refusal stands wherever the node goes.
    return code in FROM_OUTSIDE and (status is None or status.exit_code not in (10, 20))


def _ended_at(pod: Object) -> datetime:
    """Return when a pod's container ended; when the pod was made, if nobody says."""
    moment = pod["metadata"]["creationTimestamp"]
    for container in (pod.get("status") or {}).get("containerStatuses") or ():
        terminated = (container.get("state") or {}).get("terminated") or {}
        moment = terminated.get("finishedAt") or moment
    return datetime.fromisoformat(moment)


def _is_active(pod: Object | None) -> bool:
    """Does the pod wait or run?"""
    return pod is not None and _phase(pod) not in ("Succeeded", "Failed")
