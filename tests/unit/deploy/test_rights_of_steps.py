"""Steps and rollouts do their work with the rights of their own role, and touch nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from tests.rollout_world import Behaviour, MemoryStore, World
from tests.unit import yard
from tests.unit.deploy.aws_policies import allowed
from tests.unit.steps.lane_bench import Bench
from tests.unit.steps.test_download import Site
from tests.unit.yard import Yard, measurement

from trainyard.deploy.manifests import account_of, load_overlay
from trainyard.deploy.rights import ROLES, Role, bucket_policy, permissions
from trainyard.documents.base import FileEntry
from trainyard.errors import BadInput
from trainyard.releases import list_attestations
from trainyard.steps.compile import compile_bundle
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.download import download
from trainyard.steps.gate import gate
from trainyard.steps.publish import publish
from trainyard.steps.runner import run_step
from trainyard.store.folder import FolderStore
from trainyard.store.parts import Ranges

ACCOUNT = account_of([load_overlay(Path(__file__).parents[3] / "k8s", "production")])
IF_NONE_MATCH = {"s3:if-none-match": "*"}
IF_MATCH = {"s3:if-match": '"etag"'}


class Judge:
    """Asks the policies of one role before every write."""

    def __init__(self, account: str) -> None:
        self.role: Role | None = next(role for role in ROLES if role.account == account)
        """None: somebody prepares a test, and may do everything."""
        self.writes = 0

    def ask(self, action: str, key: str, **context: str) -> None:
        if self.role is None:
            return
        request = {
            "aws:SecureTransport": "true",
            "aws:PrincipalArn": ACCOUNT.role_arn(self.role),
            "s3:ObjectCreationOperation": "true",
            **context,
        }
        (resource,) = ACCOUNT.keys([key])
        own, policy = permissions(ACCOUNT, self.role), bucket_policy(ACCOUNT)
        if not allowed(own, policy, action, resource, request):
            raise BadInput(f"{self.role.account} may not do {action} on {key} with {context}.")
        self.writes += 1


class JudgedFolder(FolderStore):
    """A store in a folder, which obeys policies as a bucket does."""

    def __init__(self, root: Path, judge: Judge) -> None:
        super().__init__(root)
        self.judge = judge

    def create(self, key: str, data: bytes) -> str:
        self.judge.ask("s3:PutObject", key, **IF_NONE_MATCH)
        return super().create(key, data)

    def replace(self, key: str, data: bytes, *, version: str) -> str:
        self.judge.ask("s3:PutObject", key, **IF_MATCH)
        return super().replace(key, data, version=version)

    def put(self, key: str, data: bytes) -> str:
        self.judge.ask("s3:PutObject", key)
        return super().put(key, data)

    def delete(self, key: str, *, version: str | None = None) -> None:
        self.judge.ask("s3:DeleteObject", key)
        super().delete(key, version=version)

    def upload(self, key: str, source: BinaryIO, **options: Any) -> FileEntry:
        self.judge.ask("s3:PutObject", key, **IF_NONE_MATCH)
        return super().upload(key, source, **options)

    def upload_ranged(self, key: str, source: Ranges, **options: Any) -> FileEntry:
        self.judge.ask("s3:PutObject", key, **IF_NONE_MATCH)
        return super().upload_ranged(key, source, **options)


class JudgedMemory(MemoryStore):
    """The same in memory, for rollouts."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def create(self, key: str, data: bytes) -> str:
        self.judge.ask("s3:PutObject", key, **IF_NONE_MATCH)
        return super().create(key, data)

    def replace(self, key: str, data: bytes, *, version: str) -> str:
        self.judge.ask("s3:PutObject", key, **IF_MATCH)
        return super().replace(key, data, version=version)

    def put(self, key: str, data: bytes) -> str:
        self.judge.ask("s3:PutObject", key)
        return super().put(key, data)

    def delete(self, key: str, *, version: str | None = None) -> None:
        self.judge.ask("s3:DeleteObject", key)
        super().delete(key, version=version)


def run(
    name: str,
    account: str,
    own: Yard | Site,
    body: Callable[[StepContext], StepResult],
    **step: str,
) -> int:
    """Run a step under its lock and with its status document, with the rights of a role."""
    judge = Judge(account)
    store = JudgedFolder(own.settings.store_root, judge)

    def judged(context: StepContext) -> StepResult:
        return body(replace(own.context, store=store, work_dir=context.work_dir))

    code = run_step(name, body=judged, settings=own.settings, store=store, **step)
    assert judge.writes >= (3 if code == 0 else 0)  # A lock, a status, and what it makes.
    return code


@pytest.fixture
def measured(tmp_path: Path) -> Yard:
    """A yard in which everything is there but verdicts."""
    made = Yard(tmp_path)
    made.keep_plan(yard.plan())
    made.keep_artifacts()
    made.keep(measurement())
    return made


def test_a_download(tmp_path: Path) -> None:
    site = Site(tmp_path)
    plan = site.plan()
    site.store.create("plans/p1.json", plan.to_bytes())

    assert (
        run("download", "trainyard-download", site, lambda c: download(plan, c), plan_id="p1") == 0
    )


def test_a_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    plan = bench.plan

    code = run(
        "compile", "trainyard-compile", bench, lambda c: compile_bundle(plan, "cpu", c),
        plan_id=plan.plan_id, target="cpu",
    )  # fmt: skip

    assert code == 0


def test_gates_and_a_publication(measured: Yard) -> None:
    plan, place = yard.plan(), {"plan_id": yard.plan().plan_id, "target": "cpu"}

    for name in ("accuracy", "latency"):
        code = run(
            f"{name}-gate", "trainyard-gate", measured,
            lambda c, name=name: gate(plan, "cpu", name, c), **place,
        )  # fmt: skip
        assert code == 0
    assert run(
        "publish", "trainyard-publish", measured, lambda c: publish(plan, "cpu", c), **place
    ) == 0  # fmt: skip


@pytest.mark.parametrize("account", ["trainyard-steps", "trainyard-compile", "trainyard-guard"])
def test_a_step_with_the_rights_of_another_gets_nowhere(
    measured: Yard, account: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = yard.plan()

    code = run(
        "accuracy-gate", account, measured, lambda c: gate(plan, "cpu", "accuracy", c),
        plan_id=plan.plan_id, target="cpu",
    )  # fmt: skip

    assert code == BadInput.exit_code
    assert list(measured.store.list("verdicts")) == []


@pytest.mark.parametrize("account", ["trainyard-airflow-triggerer", "trainyard-airflow-worker"])
def test_a_promotion_and_a_rejection(account: str) -> None:
    judge = Judge(account)
    role, judge.role = judge.role, None
    world = World(store=JudgedMemory(judge))
    good = world.publish("a")
    bad = world.publish("b", behaviour=Behaviour(error_share=0.2))
    judge.role = role

    assert world.run(world.promote(good, run_id="first")).outcome == "promoted"
    assert world.run(world.promote(bad, run_id="second")).outcome == "rolled_back"

    assert list_attestations(world.store, "adder", bad, "rejection")
    assert judge.writes > 10
