"""A step as a pod, against an emulated API server: what is created, waited for and made of its end.

The tests play the cluster (scheduler, kubelet, eviction) and the step inside the pod (its status
document in the store). Airflow's operator, its trigger and both of its clients are the real ones.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.fake_cluster import NAMESPACE_NAME, FakeCluster, Fault
from tests.unit import yard as yards
from tests.unit.plugins.conftest import Memory, make_context
from tests.unit.yard import COMPILE_KEY, Yard

from trainyard.documents.plan import PlannedStep
from trainyard.documents.status import StepStatus
from trainyard.kubernetes.kinds import NODE, POD, SECRET
from trainyard.settings import get_settings
from trainyard.steps.status import read_status
from trainyard.store.layout import bundle_manifest_key, status_key

pytestmark = [
    pytest.mark.integration,
    # The provider's own choice of arguments; not ours to change.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:airflow.*"),
]

PLAN = "adder-plan"
OUTPUT = bundle_manifest_key(COMPILE_KEY)


class World:
    """A cluster, a store and one task."""

    def __init__(self, fake: FakeCluster, yard: Yard) -> None:
        self.fake = fake
        self.yard = yard
        self.memory = Memory()
        self.pushed: dict[str, Any] = {}
        self.tries = 0

    def operator(self, **changes: Any) -> Any:
        """Return the operator of a task, as a worker makes it from the DAG file."""
        from trainyard_airflow.pod_operator import PodStepOperator

        values = {
            "task_id": "compile",
            "step": "compile",
            "plan_id": PLAN,
            "target": "cpu",
            "interpreter": "serve",
            "execution_timeout": timedelta(hours=6),
            **changes,
        }
        return PodStepOperator(**values)

    def context(self) -> Any:
        """Return the context of a new try of the task."""
        self.tries += 1
        found = make_context(memory=self.memory)
        found["ti"] = SimpleNamespace(
            dag_id="neuron_release",
            task_id="target_cpu.compile",
            run_id="manual-1",
            map_index=0,
            try_number=self.tries,
            start_date=datetime.now(UTC),
            xcom_push=lambda key, value: self.pushed.__setitem__(key, value),
            task=SimpleNamespace(returns_dag_result=False),
        )
        return found

    def start(self, operator: Any, context: Any) -> Any:
        """Run the task until it waits; return what it waits with."""
        from airflow.sdk.exceptions import TaskDeferred

        with pytest.raises(TaskDeferred) as raised:
            operator.execute(context)
        return raised.value

    def follow(self, deferred: Any, context: Any, **changes: Any) -> str:
        """Let the triggerer wait, and a worker go on from there."""
        event = asyncio.run(_first_event(deferred.trigger))
        return self.resume(deferred, event, context, **changes)

    def resume(self, deferred: Any, event: Any, context: Any, **changes: Any) -> str:
        """Go on in another process with what the trigger said."""
        kwargs = json.loads(json.dumps(deferred.kwargs))
        method = getattr(self.operator(**changes), deferred.method_name)
        found: str = method(context, event=event, **kwargs)
        return found

    @property
    def pods(self) -> list[Any]:
        """All pods of the cluster."""
        return self.fake.objects(POD)

    def pod(self) -> Any:
        """Return the only pod."""
        (found,) = self.pods
        return found

    def set_status(self, **status: Any) -> None:
        """Play scheduler and kubelet of the only pod."""
        self.fake.edit(POD, self.pod()["metadata"]["name"], lambda pod: pod.update(status=status))

    def runs(self, *, node: str = "ip-10") -> None:
        """Let the pod run."""
        name = self.pod()["metadata"]["name"]
        # A log that is not there is asked for again and again.
        self.fake.logs[NAMESPACE_NAME, name, "base"] = "12:00:00 Compiling.\n"

        def change(pod: Any) -> None:
            pod["spec"]["nodeName"] = node
            pod["status"] = _container("Running", {"running": {"startedAt": _now()}})

        self.fake.edit(POD, name, change)

    def ends(self, exit_code: int, reason: str = "", **status: Any) -> None:
        """Let the container end."""
        phase = "Failed" if exit_code else "Succeeded"
        state = {
            "exitCode": exit_code,
            "reason": reason or ("Error" if exit_code else "Completed"),
            "finishedAt": _now(),
        }
        self.set_status(**{**_container(phase, {"terminated": state}), **status})

    def reports(self, state: str, **values: Any) -> None:
        """Play the step inside the pod."""
        now = datetime.now(UTC)
        status = StepStatus(
            **{  # type: ignore[arg-type]
                "plan_id": PLAN,
                "step": "compile",
                "target": "cpu",
                "state": state,
                "started_at": now,
                "updated_at": now,
                **values,
            }
        )
        self.yard.store.put(status_key(PLAN, status.step, status.target), status.to_bytes())
        if state == "done":
            self.yard.store.put(status.output_key, b"{}")

    @property
    def result(self) -> Any:
        """What the task left for whoever waits for its run."""
        return self.pushed["return_value"]

    def status(self) -> StepStatus:
        """Return the step's status document."""
        found = read_status(self.yard.store, PLAN, "compile", "cpu")
        assert found is not None
        return found


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _container(phase: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "phase": phase,
        "conditions": [{"type": "PodScheduled", "status": "True"}],
        "containerStatuses": [
            {
                "name": "base",
                "image": "x",
                "imageID": "x",
                "ready": False,
                "restartCount": 0,
                "state": dict(state),
            }
        ],
    }


async def _first_event(trigger: Any) -> Any:
    # A trigger is built again from what the database keeps of it.
    path, kwargs = trigger.serialize()
    assert path.endswith("KubernetesPodTrigger")
    again = type(trigger)(**kwargs)
    async for event in again.run():
        return event.payload
    raise AssertionError("the trigger ended without an event")


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster.running() as fake:
        yield fake


@pytest.fixture
def world(cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    from airflow.sdk.bases.operator import ExecutorSafeguard

    import trainyard_airflow.pod_operator as module

    monkeypatch.setattr(ExecutorSafeguard, "test_mode", True)
    monkeypatch.setattr(module, "POLL_S", 0.05)
    monkeypatch.setattr(module, "START_CHECK_S", 0.05)
    home = tmp_path / "home"
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(cluster.kubeconfig())
    environments = tmp_path / "environments.yaml"
    environments.write_text(
        json.dumps(
            {
                "schema": "trainyard/v1",
                "environments": {"production": {"target": "cpu"}},
                "steps": {
                    "namespace": NAMESPACE_NAME,
                    "image": "registry.example/trainyard:1",
                    "schedule_timeout_s": 1,
                    "startup_timeout_s": 1,
                    "host_mounts": [
                        {"host_path": "/data", "mount_path": str(home), "read_only": False}
                    ],
                },
            }
        )
    )
    for name, value in {
        "TRAINYARD_HOME": home,
        "TRAINYARD_KUBECONFIG": kubeconfig,
        "TRAINYARD_ENVIRONMENTS": environments,
    }.items():
        monkeypatch.setenv(name, str(value))
    get_settings.cache_clear()
    made = World(cluster, Yard(home))
    step = PlannedStep(step="compile", target="cpu", key=OUTPUT, exists=False, reason="New.")
    made.yard.keep_plan(yards.plan().model_copy(update={"steps": (step,)}))
    yield made
    get_settings.cache_clear()
    cluster.faults.clear()
    cluster.down = False
    for kind in (POD, SECRET):
        for each in cluster.objects(kind):
            cluster.remove(kind, each["metadata"]["name"])


def fails(name: str) -> Any:
    """Return the context in which a task fails with one of our exceptions."""
    from trainyard_airflow import exceptions

    return pytest.raises(getattr(exceptions, name))


class TestAHealthyPod:
    def test_it_is_created_waited_for_and_its_output_returned(self, world: World) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        pod = world.pod()
        assert pod["metadata"]["name"].startswith("compile-adder-plan-cpu-")
        assert pod["spec"]["containers"][0]["command"] == [
            "python3", "-m", "trainyard", "compile", "--plan", PLAN, "--target", "cpu",
        ]  # fmt: skip
        assert pod["metadata"]["labels"]["task_id"] == "target_cpu.compile"
        assert pod["metadata"]["labels"]["trainyard.dev/step"] == "compile"
        assert pod["spec"]["restartPolicy"] == "Never"
        world.runs()
        world.reports("done", output_key=OUTPUT, exit_code=0)
        world.ends(0)
        assert world.follow(deferred, context) == OUTPUT
        assert world.pods == []

    def test_what_the_provider_sends_is_what_we_rendered(self, world: World) -> None:
        """Its own arguments change nothing that the golden manifests show."""
        from trainyard.kubernetes.step_pod import StepWork, step_pod
        from trainyard.spec.loader import load_environments

        world.start(world.operator(), world.context())
        place = load_environments(get_settings().environments).steps
        assert place is not None
        wanted = step_pod(
            StepWork("compile", PLAN, "adder", yards.plan().targets[0].target),
            place,
            env={
                "TRAINYARD_STORE": str(world.yard.settings.store_root.resolve()),
                "TRAINYARD_DAG_RUN": "neuron_release/manual-1",
                "TRAINYARD_REQUESTED_BY": "ada",
            },
            now=datetime.now(UTC),
        )
        sent = world.pod()
        assert wanted["metadata"]["labels"].items() <= sent["metadata"]["labels"].items()
        assert sent["metadata"]["annotations"] == wanted["metadata"]["annotations"]
        for part in ("nodeSelector", "tolerations"):
            assert sent["spec"].pop(part, None) in (wanted["spec"][part], None)
            del wanted["spec"][part]
        assert sent["spec"].pop("hostNetwork") is False
        assert _filled(sent["spec"]) == _filled(wanted["spec"])

    def test_no_pod_is_needed_for_what_is_in_the_store(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from trainyard_airflow.step_operator import StepOperator

        world.yard.store.put(OUTPUT, b"{}")
        monkeypatch.setattr(
            StepOperator, "_run", lambda *_: world.reports("done", output_key=OUTPUT) or 0
        )
        assert world.operator().execute(world.context()) == OUTPUT
        assert world.pods == []

    def test_a_pod_that_was_killed_after_its_last_write_is_done(self, world: World) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs()
        world.reports("done", output_key=OUTPUT, exit_code=0)
        world.ends(137)
        assert world.follow(deferred, context) == OUTPUT

    def test_a_pod_that_is_gone_is_done_if_its_output_is_there(self, world: World) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs()
        world.reports("done", output_key=OUTPUT, exit_code=0)
        world.ends(0)
        event = asyncio.run(_first_event(deferred.trigger))
        world.fake.remove(POD, world.pod()["metadata"]["name"])
        assert world.resume(deferred, event, context) == OUTPUT


def _filled(value: Any) -> Any:
    """Return a manifest without what is empty, which a client may leave out."""
    if isinstance(value, dict):
        inner = {key: _filled(each) for key, each in value.items()}
        return {key: each for key, each in inner.items() if each not in ({}, [], None)}
    return [_filled(each) for each in value] if isinstance(value, list) else value


class TestFailures:
    @pytest.mark.parametrize(
        ("code", "name"),
        [
            (10, "StepRefused"),
            (20, "StepRefused"),
            (30, "StepTransient"),
            (40, "StepCapacity"),
            (75, "StepTransient"),
            (1, "StepDefect"),
        ],
    )
    def test_the_steps_own_words_are_the_reason(self, world: World, code: int, name: str) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs()
        world.reports("failed", exit_code=code, reason="It went wrong.", hint="Mend it.")
        world.ends(code)
        with fails(name) as raised:
            world.follow(deferred, context)
        assert str(raised.value) == "It went wrong. Mend it."
        assert world.result == {
            "outcome": "failed",
            "reason": "It went wrong. Mend it.",
            "step": "compile",
            "target": "cpu",
        }
        assert context["ti"].task.returns_dag_result
        # It can be looked at, and is not taken for the pod of the next try.
        assert world.pod()["metadata"]["labels"]["already_checked"] == "True"

    def test_out_of_memory_asks_for_more_the_next_time(self, world: World) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        before = _memory(world.pod())
        world.runs()
        world.reports("running", reason="Compiling.", log_tail=("12:00:00 Compiling.",))
        world.ends(137, "OOMKilled")
        with fails("StepCapacity") as raised:
            world.follow(deferred, context)
        assert "The pod ran out of memory: container base terminated: OOMKilled" in str(
            raised.value
        )
        status = world.status()
        assert (status.state, status.exit_code, status.code) == ("failed", 40, "host-out-of-memory")
        assert status.log_tail == ("12:00:00 Compiling.",)
        assert status.tuning == {"out_of_memory": 1}
        assert world.result["code"] == "host-out-of-memory"
        assert world.result["reason"].startswith("The pod ran out of memory")
        world.start(world.operator(), world.context())
        newest = max(world.pods, key=lambda pod: pod["metadata"]["labels"]["try_number"])
        assert _memory(newest) == 2 * before

    def test_an_eviction_is_tried_again_elsewhere(self, world: World) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs()
        # SIGTERM came first, so the step had last words; the pod knows more.
        world.reports("failed", exit_code=30, reason="Stopped by SIGTERM.")
        world.ends(
            143,
            conditions=[
                {
                    "type": "DisruptionTarget",
                    "status": "True",
                    "reason": "EvictionByEvictionAPI",
                    "message": "Eviction API: evicting",
                }
            ],
        )
        with fails("StepTransient") as raised:
            world.follow(deferred, context)
        assert "The pod was evicted" in str(raised.value)
        assert world.status().code == "evicted"

    def test_a_broken_device_is_the_nodes_fault(self, world: World) -> None:
        world.fake.put(
            NODE,
            {
                "metadata": {"name": "ip-66"},
                "status": {
                    "conditions": [
                        {
                            "type": "NeuronHealth",
                            "status": "True",
                            "reason": "NeuronHasError_HBM_UNCORRECTABLE_ERROR",
                            "message": "NEURON_HW_ERR=HBM_UNCORRECTABLE_ERROR",
                        }
                    ]
                },
            },
        )
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs(node="ip-66")
        world.reports("failed", exit_code=20, reason="The server ended.")
        world.ends(20)
        with fails(
            "StepTransient",
        ) as raised:
            world.follow(deferred, context)
        assert "NeuronHasError_HBM_UNCORRECTABLE_ERROR" in str(raised.value)
        world.start(world.operator(), world.context())
        newest = max(world.pods, key=lambda pod: pod["metadata"]["labels"]["try_number"])
        assert "ip-66" in json.dumps(newest["spec"]["affinity"]["nodeAffinity"])

    def test_a_refusal_stands_though_the_node_goes(self, world: World) -> None:
        taint = {"key": "aws-node-termination-handler/spot-itn", "effect": "NoSchedule"}
        world.fake.put(NODE, {"metadata": {"name": "ip-77"}, "spec": {"taints": [taint]}})
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs(node="ip-77")
        world.reports("failed", exit_code=20, reason="The compiler says no.")
        world.ends(20)
        with fails("StepRefused"):
            world.follow(deferred, context)

    def test_a_spot_interruption_is_told_by_its_name(self, world: World) -> None:
        taint = {"key": "aws-node-termination-handler/spot-itn", "effect": "NoSchedule"}
        world.fake.put(NODE, {"metadata": {"name": "ip-77"}, "spec": {"taints": [taint]}})
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs(node="ip-77")
        world.reports("failed", exit_code=30, reason="Stopped by SIGTERM.")
        world.ends(143)
        with fails("StepTransient") as raised:
            world.follow(deferred, context)
        assert "spot interruption" in str(raised.value)
        assert world.status().code == "spot-interruption"

    def test_what_an_earlier_pod_said_is_no_log_of_this_one(self, world: World) -> None:
        old = datetime.now(UTC) - timedelta(hours=1)
        world.reports("failed", exit_code=20, reason="Old.", started_at=old, log_tail=("old",))
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs()
        world.ends(137, "OOMKilled")
        with fails("StepCapacity"):
            world.follow(deferred, context)
        assert (world.status().log_tail, world.status().attempt) == ((), 2)

    def test_a_pod_without_a_node_is_removed_and_tried_later(self, world: World) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.set_status(
            phase="Pending",
            conditions=[
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "0/3 nodes are available: 3 Insufficient aws.amazon.com/neuron.",
                }
            ],
        )
        with fails("StepCapacity") as raised:
            world.follow(deferred, context)
        assert "Insufficient aws.amazon.com/neuron" in str(raised.value)
        assert world.pods == []
        assert world.status().code == "unschedulable"

    def test_an_image_that_does_not_exist_is_refused(self, world: World) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        waiting = {"reason": "InvalidImageName", "message": "couldn't parse image name"}
        world.set_status(**_container("Pending", {"waiting": waiting}))
        with fails("StepRefused") as raised:
            world.follow(deferred, context)
        assert "The image cannot be pulled" in str(raised.value)
        assert world.pods == []

    def test_a_pod_that_vanished_is_tried_again(self, world: World) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs()
        world.fake.remove(POD, world.pod()["metadata"]["name"])
        event = {"status": "error", "namespace": NAMESPACE_NAME, "name": deferred.kwargs["pod"],
                 "message": "pod not found"}  # fmt: skip
        with fails("StepTransient") as raised:
            world.resume(deferred, event, context)
        assert "The pod is gone" in str(raised.value)

    def test_the_tasks_own_limit_ends_the_pod(self, world: World) -> None:
        context = world.context()
        changes = {"execution_timeout": timedelta(seconds=1)}
        deferred = world.start(world.operator(**changes), context)
        world.runs()
        world.reports("running", reason="Compiling.")
        with fails("StepRefused") as raised:
            world.follow(deferred, context, **changes)
        assert "took longer than it may" in str(raised.value)
        assert world.pods == []

    def test_an_earlier_report_is_not_taken_for_this_pods(self, world: World) -> None:
        old = datetime.now(UTC) - timedelta(hours=1)
        world.reports("failed", exit_code=20, reason="An old story.", started_at=old)
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs()
        world.ends(1)
        with fails("StepDefect") as raised:
            world.follow(deferred, context)
        assert "exit code 1 and left no report" in str(raised.value)

    def test_a_step_that_ended_well_and_made_nothing_is_a_defect(self, world: World) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs()
        world.ends(0)
        with fails("StepDefect"):
            world.follow(deferred, context)


def _memory(pod: Any) -> int:
    text: str = pod["spec"]["containers"][0]["resources"]["requests"]["memory"]
    return int(text.removesuffix("Gi"))


class TestTheApi:
    @pytest.mark.parametrize("status", [500, 503, 409])
    def test_a_server_that_stumbles_is_asked_again(self, world: World, status: int) -> None:
        world.fake.faults.append(Fault("create", "pods", status, times=1))
        world.start(world.operator(), world.context())
        assert len(world.pods) == 1

    def test_a_server_that_is_down_is_tried_again_later(self, world: World) -> None:
        world.fake.down = True
        with fails("StepTransient"):
            world.operator().execute(world.context())

    def test_a_missing_right_is_refused(self, world: World) -> None:
        world.fake.faults.append(Fault("create", "pods", 403, "Forbidden", "no right"))
        with fails("StepRefused") as raised:
            world.operator().execute(world.context())
        assert "Give this service account the right" in str(raised.value)
        assert world.result["reason"] == str(raised.value)

    def test_a_used_up_quota_is_tried_later(self, world: World) -> None:
        world.fake.faults.append(Fault.quota("pods"))
        with fails("StepCapacity") as raised:
            world.operator().execute(world.context())
        assert "exceeded quota" in str(raised.value)

    def test_nodes_that_may_not_be_read_hide_nothing_else(self, world: World) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs()
        world.ends(137, "OOMKilled")
        world.fake.faults.append(Fault("get", "nodes", 403, "Forbidden", "no right"))
        with fails("StepCapacity"):
            world.follow(deferred, context)


class TestReattaching:
    def test_a_new_try_finds_the_pod_of_a_worker_that_died(self, world: World) -> None:
        world.start(world.operator(), world.context())
        world.runs()
        world.reports("running", reason="Compiling.")
        context = world.context()
        deferred = world.start(world.operator(), context)
        assert len(world.pods) == 1
        world.reports("done", output_key=OUTPUT, exit_code=0)
        world.ends(0)
        assert world.follow(deferred, context) == OUTPUT

    def test_the_report_of_the_found_pod_counts(self, world: World) -> None:
        world.start(world.operator(), world.context())
        world.runs()
        world.reports("running", reason="Compiling.")
        context = world.context()
        deferred = world.start(world.operator(), context)
        status = world.status()
        failed = {"state": "failed", "exit_code": 20, "reason": "The compiler says no."}
        world.yard.store.put(
            status_key(PLAN, "compile", "cpu"), status.model_copy(update=failed).to_bytes()
        )
        world.ends(20)
        with fails(
            "StepRefused",
        ) as raised:
            world.follow(deferred, context)
        assert "The compiler says no." in str(raised.value)

    def test_a_pod_that_failed_while_nobody_looked_is_told(self, world: World) -> None:
        world.start(world.operator(), world.context())
        world.runs()
        world.reports("failed", exit_code=20, reason="The compiler says no.", hint="Mend it.")
        world.ends(20)
        with fails("StepRefused") as raised:
            world.operator().execute(world.context())
        assert "The compiler says no." in str(raised.value)
        assert world.result["reason"] == str(raised.value)

    def test_two_pods_of_one_task_are_left_to_people(self, world: World) -> None:
        world.start(world.operator(), world.context())
        pod = world.pod()
        twin = {"metadata": {"name": "twin", "labels": pod["metadata"]["labels"]}}
        world.fake.put(POD, {**twin, "spec": pod["spec"], "status": {"phase": "Running"}})
        world.memory.clear()
        with fails("StepDefect") as raised:
            world.operator().execute(world.context())
        assert "More than one pod" in str(raised.value)
        assert len(world.pods) == 2

    def test_a_pod_that_runs_but_cannot_be_followed_is_left_for_the_next_try(
        self, world: World
    ) -> None:
        context = world.context()
        deferred = world.start(world.operator(), context)
        world.runs()
        event = {"status": "error", "namespace": NAMESPACE_NAME, "name": deferred.kwargs["pod"],
                 "message": "no right to watch", "_redefer_count": 3}  # fmt: skip
        with fails("StepTransient") as raised:
            world.resume(deferred, event, context)
        assert "cannot be followed" in str(raised.value)
        assert world.pod()["metadata"]["labels"].get("already_checked") is None


class TestSecrets:
    @pytest.fixture
    def keys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        value = {"conn_type": "aws", "login": "AKIAEXAMPLE", "password": "hush-hush"}
        monkeypatch.setenv("AIRFLOW_CONN_YARD_AWS", json.dumps(value))
        monkeypatch.setenv("TRAINYARD_AWS_CONNECTION", "yard_aws")
        get_settings.cache_clear()

    @pytest.mark.usefixtures("keys")
    def test_credentials_are_in_a_secret_that_goes_with_the_task(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import trainyard_airflow.aws_connection as aws

        # The folder of the yard stands for the store in S3 that these keys would open.
        monkeypatch.setattr(aws, "open_task_store", lambda _: world.yard.store)
        context = world.context()
        deferred = world.start(world.operator(), context)
        (secret,) = world.fake.objects(SECRET)
        pod = world.pod()
        assert secret["stringData"]["AWS_SECRET_ACCESS_KEY"] == "hush-hush"
        assert pod["spec"]["containers"][0]["envFrom"] == [
            {"secretRef": {"name": secret["metadata"]["name"]}}
        ]
        assert "hush-hush" not in json.dumps(pod)
        assert "hush-hush" not in json.dumps(deferred.kwargs)
        assert "hush-hush" not in repr(deferred.trigger.serialize())
        (owner,) = secret["metadata"]["ownerReferences"]
        assert owner["uid"] == pod["metadata"]["uid"]
        world.runs()
        world.reports("done", output_key=OUTPUT, exit_code=0)
        world.ends(0)
        assert world.follow(deferred, context) == OUTPUT
        assert world.fake.objects(SECRET) == []

    def test_without_a_connection_there_is_none(self, world: World) -> None:
        world.start(world.operator(), world.context())
        assert world.fake.objects(SECRET) == []
        assert not world.pod()["spec"]["containers"][0].get("envFrom")


class TestCleaningUp:
    def test_old_failed_pods_are_removed_and_others_stay(self, world: World) -> None:
        def failed(name: str, age: timedelta, labels: Mapping[str, str]) -> None:
            ended = (datetime.now(UTC) - age).strftime("%Y-%m-%dT%H:%M:%SZ")
            state = {"terminated": {"exitCode": 20, "finishedAt": ended}}
            world.fake.put(
                POD,
                {
                    "metadata": {"name": name, "labels": dict(labels)},
                    "spec": {"containers": [{"name": "base"}]},
                    "status": _container("Failed", state),
                },
            )

        from trainyard.kubernetes.labels import owned

        failed("old", timedelta(days=2), owned("step"))
        failed("new", timedelta(hours=1), owned("step"))
        failed("others", timedelta(days=9), {})
        world.start(world.operator(), world.context())
        names = {pod["metadata"]["name"] for pod in world.pods}
        assert "old" not in names
        assert {"new", "others"} <= names

    def test_ending_the_task_removes_its_pod(self, world: World) -> None:
        operator = world.operator()
        world.start(operator, world.context())
        operator.on_kill()
        assert world.pods == []

    def test_ending_a_task_that_never_had_a_pod_does_nothing(self, world: World) -> None:
        world.operator().on_kill()


def test_without_a_place_the_task_says_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text(
        '{"schema": "trainyard/v1", "environments": {"production": {"target": "cpu"}}}'
    )
    monkeypatch.setenv("TRAINYARD_ENVIRONMENTS", str(plain))
    get_settings.cache_clear()
    with fails("StepRefused") as raised:
        world.operator().execute(world.context())
    assert "names no place for pods" in str(raised.value)
