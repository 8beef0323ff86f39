"""Every write that the table does not give is tried and refused; what it gives, holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.unit.deploy.aws_policies import allowed

from trainyard.deploy.manifests import AIRFLOW_NAMESPACE, STEPS_NAMESPACE, account_of, load_overlays
from trainyard.deploy.rights import COMPARED, KEYS, ROLES, WRITTEN_ONCE, Account, Role, policies
from trainyard.errors import BadInput
from trainyard.store import layout

ROOT = Path(__file__).parents[3] / "k8s"
ACCOUNT = account_of(load_overlays(ROOT, ["staging", "production"], None))
POLICIES = policies(ACCOUNT)
BUCKET_POLICY = POLICIES["bucket_policy"]["Statement"]

DIGEST = "0" * 64
MODEL, RELEASE_ID, PLAN = "llama", "llama-0123456789ab", "llama-20260101t000000"
STATUS = {
    step: layout.status_key(PLAN, step, "" if step in {"plan", "download"} else "trn2")
    for step in (
        "plan",
        "download",
        "compile",
        "tasks",
        "measure",
        "logits",
        "accuracy-gate",
        "latency-gate",
        "publish",
    )
}

WORKER, TRIGGERER = "trainyard-airflow-worker", "trainyard-airflow-triggerer"
DOWNLOAD, COMPILE, MEASURE = "trainyard-download", "trainyard-compile", "trainyard-measure"
GATE, PUBLISH, GC, GUARD = "trainyard-gate", "trainyard-publish", "trainyard-gc", "trainyard-guard"
DOCTOR = "trainyard-doctor"
ROLLOUTS = {WORKER, TRIGGERER}


def attestation(kind: str) -> str:
    return layout.attestation_key(MODEL, RELEASE_ID, kind, "a1")


def lock(*parts: str) -> str:
    return layout.lock_key("/".join(parts))


WRITERS: dict[str, set[str]] = {
    layout.plan_key(PLAN): {WORKER},
    f"{layout.evals_prefix(DIGEST)}/task.yaml": {WORKER},
    f"{layout.checkpoint_prefix(MODEL, 'abc123')}/model.safetensors": {DOWNLOAD},
    layout.checkpoint_manifest_key(MODEL, "abc123"): {DOWNLOAD},
    f"{layout.bundle_prefix(DIGEST)}/graph.neff": {COMPILE},
    layout.bundle_manifest_key(DIGEST): {COMPILE},
    layout.measurement_key("m1"): {MEASURE},
    layout.samples_key("m1", "0a1b"): {MEASURE},
    layout.logits_key("m1", "0a1b"): {MEASURE},
    layout.tasks_key("m1"): {MEASURE},
    layout.reference_key(DIGEST, "0a1b"): {MEASURE},
    layout.verdict_key(PLAN, "trn2", "accuracy"): {GATE},
    layout.expectations_key(PLAN, "trn2", "latency"): {GATE},
    layout.gate_report_key(PLAN, "trn2", "latency"): {GATE},
    layout.release_key(MODEL, RELEASE_ID): {PUBLISH},
    attestation("verdict"): {PUBLISH},
    attestation("promotion"): ROLLOUTS,
    attestation("rejection"): ROLLOUTS,
    attestation("approval"): ROLLOUTS,
    layout.channel_key(MODEL, "production"): ROLLOUTS,
    f"archive/{MODEL}/production/000001-a.json": ROLLOUTS,
    f"{layout.rollout_prefix(MODEL, 'production', 1)}/looks/000001.json": ROLLOUTS,
    f"{layout.rollout_prefix(MODEL, 'production', 1)}/events/rollout-1-x.json": ROLLOUTS,
    f"{layout.rollout_prefix(MODEL, 'production', 1)}/events/guard-x.json": {*ROLLOUTS, GUARD},
    STATUS["plan"]: {WORKER},
    STATUS["download"]: {DOWNLOAD, WORKER},
    STATUS["compile"]: {COMPILE, WORKER},
    STATUS["measure"]: {MEASURE, WORKER},
    STATUS["logits"]: {MEASURE, WORKER},
    STATUS["tasks"]: {MEASURE, WORKER},
    STATUS["accuracy-gate"]: {GATE, WORKER},
    STATUS["latency-gate"]: {GATE, WORKER},
    STATUS["publish"]: {PUBLISH, WORKER},
    # A step locks the key it makes, or its own name where no plan says which that is.
    lock(PLAN, "plan"): {WORKER, GC},
    lock(layout.checkpoint_manifest_key(MODEL, "abc123")): {DOWNLOAD, GC},
    lock(layout.bundle_manifest_key(DIGEST)): {COMPILE, GC},
    lock(layout.measurement_key("m1")): {MEASURE, GC},
    lock(layout.logits_key("m1", "0a1b")): {MEASURE, GC},
    lock(layout.tasks_key("m1")): {MEASURE, GC},
    lock(PLAN, "accuracy-gate", "trn2"): {GATE, GC},
    lock(layout.release_prefix(MODEL)): {PUBLISH, GC},
    lock(layout.release_key(MODEL, RELEASE_ID)): {PUBLISH, GC},
    lock(PLAN, "compile", "trn2"): {COMPILE, GC},
    layout.toolchain_key("image", "cpu"): {COMPILE, DOCTOR},
    layout.refresh_key(MODEL): {WORKER},
    "proofs/neuron-native/trn2.48xlarge/p1.json": {DOCTOR},
    ".trainyard/probe/0123456789abcdef": {
        *ROLLOUTS, DOCTOR, DOWNLOAD, COMPILE, MEASURE, GATE, PUBLISH, GC, GUARD,
    },
    "something-else/x": set(),
}  # fmt: skip
"""Who may write each kind of key; everybody else is refused."""

NEVER_DELETED = {"channels", "attestations", "archive", "proofs", "toolchains", "refreshes"}
REPAIRED = {"checkpoints": {DOWNLOAD}, "bundles": {COMPILE}, "releases": {PUBLISH}}


def deleters(key: str) -> set[str]:
    folder = key.partition("/")[0]
    if folder == ".trainyard":
        return WRITERS[key]
    if folder in NEVER_DELETED or folder == "something-else":
        return set()
    return {GC, *REPAIRED.get(folder, ())}


def request(role: Role | None, **more: str) -> dict[str, str]:
    """The condition keys of a request over TLS; of an administrator without a role of ours."""
    arn = ACCOUNT.role_arn(role) if role else "arn:aws:iam::111122223333:role/Administrator"
    return {"aws:SecureTransport": "true", "aws:PrincipalArn": arn, **more}


CREATES = {"s3:ObjectCreationOperation": "true"}
IF_NONE_MATCH = {**CREATES, "s3:if-none-match": "*"}
IF_MATCH = {**CREATES, "s3:if-match": '"etag"'}


def own(role: Role) -> list[dict[str, Any]]:
    name = ACCOUNT.role_arn(role).rpartition("/")[2]
    statements: list[dict[str, Any]] = POLICIES["roles"][name]["permissions"]["Statement"]
    return statements


def may(role: Role, action: str, key: str, **context: str) -> bool:
    (resource,) = ACCOUNT.keys([key])
    return allowed(own(role), BUCKET_POLICY, action, resource, request(role, **context))


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.account)
def test_a_role_writes_its_own_keys_and_no_others(role: Role) -> None:
    for key, writers in WRITERS.items():
        wanted = role.account in writers
        assert may(role, "s3:PutObject", key, **IF_NONE_MATCH) == wanted, key
        # A part of an upload carries no condition and creates nothing.
        part = {"s3:ObjectCreationOperation": "false"}
        assert may(role, "s3:PutObject", key, **part) == wanted, key


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.account)
def test_a_role_deletes_what_it_repairs_or_collects_and_nothing_else(role: Role) -> None:
    for key in WRITERS:
        assert may(role, "s3:DeleteObject", key) == (role.account in deleters(key)), key


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.account)
def test_what_is_written_once_cannot_be_replaced(role: Role) -> None:
    for key in WRITERS:
        kind = f"{key.partition('/')[0]}/*"
        if kind in (*WRITTEN_ONCE, *COMPARED):
            assert not may(role, "s3:PutObject", key, **CREATES), key
        if kind in WRITTEN_ONCE:
            assert not may(role, "s3:PutObject", key, **IF_MATCH), key
        if kind in COMPARED:
            assert may(role, "s3:PutObject", key, **IF_MATCH) == (role.account in WRITERS[key])


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.account)
def test_everybody_reads_the_store_and_nothing_else(role: Role) -> None:
    def listing(**context: str) -> bool:
        full = request(role, **context)
        return allowed(own(role), BUCKET_POLICY, "s3:ListBucket", ACCOUNT.bucket_arn, full)

    for key in WRITERS:
        assert may(role, "s3:GetObject", key)
    assert listing(**{"s3:prefix": f"{ACCOUNT.prefix}/channels/"})
    # Asking for one missing key is a list request without a prefix.
    assert listing()
    assert not listing(**{"s3:prefix": "others/"})
    for resource in (f"{ACCOUNT.bucket_arn}/others/x", "arn:aws:s3:::another-bucket/x"):
        assert not allowed(own(role), BUCKET_POLICY, "s3:GetObject", resource, request(role))


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.account)
def test_nothing_works_without_tls_or_with_another_key_of_encryption(role: Role) -> None:
    for key in WRITERS:
        plain = {**IF_NONE_MATCH, "aws:SecureTransport": "false"}
        assert not may(role, "s3:PutObject", key, **plain)
        assert not may(role, "s3:GetObject", key, **{"aws:SecureTransport": "false"})
        header = "s3:x-amz-server-side-encryption-aws-kms-key-id"
        assert not may(role, "s3:PutObject", key, **IF_NONE_MATCH, **{header: "another"})
        good = may(role, "s3:PutObject", key, **IF_NONE_MATCH, **{header: ACCOUNT.store_kms_key})
        assert good == (role.account in WRITERS[key])


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.account)
def test_no_role_has_a_right_that_is_not_about_the_store_or_its_keys(role: Role) -> None:
    known = {
        "s3:GetObject", "s3:ListBucket", "s3:PutObject", "s3:DeleteObject",
        "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts", "s3:ListBucketMultipartUploads",
        "kms:Decrypt", "kms:GenerateDataKey",
    }  # fmt: skip
    actions = {action for each in own(role) for action in each["Action"]}

    signs = {"kms:Sign", "kms:GetPublicKey"}
    assert actions - known == (signs if role.account in {PUBLISH, DOCTOR} else set())
    assert all(each["Effect"] == "Allow" for each in own(role))
    writes = any(each["Sid"] == "Write" for each in own(role))
    assert ("kms:GenerateDataKey" in actions) == writes


def test_airflow_s_logs_are_written_by_tasks_and_read_by_the_page_only() -> None:
    resource = f"arn:aws:s3:::{ACCOUNT.logs}/dag_id=x/attempt=1.log"

    def who(action: str) -> set[str]:
        # They are in another bucket, which has no policy of ours.
        return {role.account for role in ROLES if allowed(own(role), [], action, resource, {})}

    assert who("s3:PutObject") == ROLLOUTS
    assert who("s3:GetObject") == {*ROLLOUTS, "trainyard-airflow-api-server"}


def test_an_administrator_cannot_write_into_the_store_by_accident() -> None:
    everything = [{"Effect": "Allow", "Action": ["s3:*"], "Resource": ["*"]}]

    for key in WRITERS:
        (resource,) = ACCOUNT.keys([key])
        inside = key != "something-else/x"
        for action in ("s3:PutObject", "s3:DeleteObject"):
            done = allowed(
                everything, BUCKET_POLICY, action, resource, request(None, **IF_NONE_MATCH)
            )
            assert done == (not inside), key
        assert allowed(everything, BUCKET_POLICY, "s3:GetObject", resource, request(None))


def test_every_kind_of_key_in_the_store_is_in_the_table() -> None:
    from trainyard.store.objects import _SHAPES

    folders = {kind.partition("/")[0] for kind in KEYS}
    assert {*_SHAPES, ".trainyard"} <= folders
    # Each is tried above.
    assert folders == {key.partition("/")[0] for key in WRITERS} - {"something-else"}


def test_a_role_is_taken_by_its_own_service_account_only() -> None:
    namespaces = {
        "steps": {STEPS_NAMESPACE},
        "airflow": {AIRFLOW_NAMESPACE},
        "serving": {"trainyard-staging", "trainyard-production"},
    }
    for role in ROLES:
        name = ACCOUNT.role_arn(role).rpartition("/")[2]
        subjects = set()
        for each in POLICIES["roles"][name]["trust"]["Statement"]:
            assert each["Action"] == "sts:AssumeRoleWithWebIdentity"
            (tests,) = each["Condition"].values()
            assert set(each["Condition"]) == {"StringEquals"}
            ((_, audience), (_, subject)) = sorted(tests.items())
            assert audience == "sts.amazonaws.com"
            subjects.add(subject)
        assert subjects == {
            f"system:serviceaccount:{namespace}:{role.account}"
            for namespace in namespaces[role.where]
        }


def test_policies_are_as_small_as_aws_wants_them() -> None:
    assert len(json.dumps(POLICIES["bucket_policy"])) <= 20_480
    for each in POLICIES["roles"].values():
        # The limit of a managed policy, without white space.
        assert len(json.dumps(each["permissions"], separators=(",", ":"))) <= 6_144
        assert len(json.dumps(each["trust"], separators=(",", ":"))) <= 2_048


def test_a_bucket_that_is_the_store_itself_has_no_prefix() -> None:
    account = Account(
        bucket="b", prefix="", region="cn-north-1", roles="arn:aws-cn:iam::111122223333:role/x",
        store_kms_key="arn:aws-cn:kms:cn-north-1:111122223333:key/k",
    )  # fmt: skip

    assert account.keys(["plans/*"]) == ["arn:aws-cn:s3:::b/plans/*"]
    text = json.dumps(policies(account))
    assert "s3.cn-north-1.amazonaws.com.cn" in text
    assert "arn:aws:" not in text


@pytest.mark.parametrize(
    ("overlays", "said"), [(["cpu"], "'roles'"), (["production", "cpu"], "differ in|'roles'")]
)
def test_a_cluster_without_roles_gets_no_policies(overlays: list[str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        account_of(load_overlays(ROOT, overlays, None))


# --- The same over HTTP -----------------------------------------------------------------------


@pytest.fixture
def signed_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """S3 clients by service account, in an emulated AWS that enforces the roles' own policies.

    moto enforces actions and resources; it does not know conditions of S3, so the bucket's policy
    stays with the judge above.
    """
    import boto3
    from moto import mock_aws
    from moto.core import set_initial_no_auth_action_count

    for name, value in (
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "eu-central-1"),
    ):
        monkeypatch.setenv(name, value)
    with mock_aws():
        iam, sts = boto3.client("iam"), boto3.client("sts")
        boto3.client("s3").create_bucket(
            Bucket=ACCOUNT.bucket,
            CreateBucketConfiguration={"LocationConstraint": "eu-central-1"},
        )
        clients = {}
        for role in ROLES:
            made = iam.create_role(
                RoleName=role.account,
                AssumeRolePolicyDocument=json.dumps(
                    {
                        "Version": "2012-10-17",
                        "Statement": [
                            {
                                "Effect": "Allow",
                                "Principal": {"AWS": "*"},
                                "Action": "sts:AssumeRole",
                            }
                        ],
                    }
                ),
            )["Role"]
            iam.put_role_policy(
                RoleName=role.account,
                PolicyName="own",
                PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": own(role)}),
            )
            key = sts.assume_role(RoleArn=made["Arn"], RoleSessionName="test")["Credentials"]
            clients[role.account] = boto3.client(
                "s3",
                aws_access_key_id=key["AccessKeyId"],
                aws_secret_access_key=key["SecretAccessKey"],
                aws_session_token=key["SessionToken"],
            )

        @set_initial_no_auth_action_count(0)
        def enforced(call: Any) -> Any:
            return call()

        yield {"clients": clients, "enforced": enforced}


def test_an_emulated_aws_refuses_every_forbidden_write(signed_in: dict[str, Any]) -> None:
    from botocore.exceptions import ClientError

    def tried(call: Any) -> bool:
        try:
            signed_in["enforced"](call)
        except ClientError as error:
            if error.response["Error"]["Code"] != "AccessDenied":
                raise
            return False
        return True

    for account, client in signed_in["clients"].items():
        for key, writers in WRITERS.items():
            where = {"Bucket": ACCOUNT.bucket, "Key": f"{ACCOUNT.prefix}/{key}"}
            written = tried(partial(client.put_object, **where, Body=b"x"))
            assert written == (account in writers), (account, key)
            deleted = tried(partial(client.delete_object, **where))
            assert deleted == (account in deleters(key)), (account, key)
