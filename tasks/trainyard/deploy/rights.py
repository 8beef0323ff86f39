"""Who may write what in the store: one table, from which every AWS policy is made.

A role reads the whole store and writes only what its work makes. The bucket's policy says the same
once more, for everybody: what a role may not write, nobody else with broad rights in the account
can write by accident either, and what is written once can only be written on that condition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Where = Literal["steps", "serving", "airflow"]
"""Namespaces by what runs in them."""

WRITTEN_ONCE = (
    "plans/*", "evals/*", "checkpoints/*", "bundles/*", "measurements/*", "samples/*",
    "references/*", "verdicts/*", "reports/*", "rollouts/*", "archive/*", "proofs/*",
)  # fmt: skip
"""Keys that are created and never replaced: every write must carry `If-None-Match: *`."""

COMPARED = ("releases/*", "attestations/*", "channels/*", "refreshes/*", "locks/*")
"""Keys that are replaced by compare-and-swap: a write must carry `If-None-Match` or `If-Match`."""

FREE = ("status/*", "toolchains/*", ".trainyard/*")
"""Keys of which the last writer wins: progress for people, what an image says of itself, and the
store's probe of itself."""

KEYS = (*WRITTEN_ONCE, *COMPARED, *FREE)
"""Everything in the store."""

_PROBE = ".trainyard/*"
_ALL_LOCKS = "locks/*"


@dataclass(frozen=True)
class Role:
    """What one service account does with the store."""

    account: str
    """Name of the service account, and the end of its role's name."""
    where: Where
    """Namespace of the service account."""
    does: str
    """Its work, for people."""
    writes: tuple[str, ...] = ()
    """Patterns of keys, below the store's prefix."""
    deletes: tuple[str, ...] = ()
    """Patterns of keys; the probe and what a step has to repair."""
    uploads: tuple[str, ...] = ()
    """Patterns of keys that are large files, sent in parts."""
    signs: bool = False
    """May it sign with the KMS key of releases?"""
    logs: Literal["", "reads", "writes"] = ""
    """What it does with Airflow's logs of tasks."""


def _step(
    name: str,
    does: str,
    makes: Sequence[str],
    *,
    status: str = "",
    repairs: Sequence[str] = (),
    uploads: Sequence[str] = (),
    also: Sequence[str] = (),
    signs: bool = False,
) -> Role:
    """Return the role of a step: it writes what it makes, its lock, its status, and the probe.

    A step locks the key that it makes, or its own name where no plan says which that is.
    """
    status = status or f"{name}/*"
    return Role(
        f"trainyard-{name}",
        "steps",
        does,
        writes=(
            *makes, *(f"locks/{each}" for each in makes), f"locks/*/{status}", f"status/*/{status}",
            *also, _PROBE,
        ),
        deletes=(*repairs, _PROBE),
        uploads=(*uploads, _PROBE),
        signs=signs,
    )  # fmt: skip


_ROLLOUT_WRITES = (
    "channels/*", "rollouts/*", "archive/*", "attestations/*/promotion-*",
    "attestations/*/rejection-*", "attestations/*/approval-*",
)  # fmt: skip

_BESIDE = (
    "locks/samples/*",
    *(f"{kind}/*/{step}/*" for step in ("tasks", "logits") for kind in ("locks", "status")),
)
"""Of the steps `tasks` and `logits`, which store their reports among the samples."""

ROLES = (
    Role("trainyard-steps", "steps", "A step that has no account of its own: reads."),
    _step(
        "download", "Stores checkpoints.", ["checkpoints/*"], status="download.json",
        repairs=["checkpoints/*"], uploads=["checkpoints/*"],
    ),
    _step(
        "compile", "Stores bundles, and what toolchain its image has.", ["bundles/*"],
        repairs=["bundles/*"], uploads=["bundles/*"], also=["toolchains/*"],
    ),
    _step(
        "measure", "Stores measurements, with their samples and references.",
        ["measurements/*"], also=["samples/*", "references/*", *_BESIDE],
    ),
    _step(
        "gate", "Stores verdicts and their reports.", ["verdicts/*", "reports/*"],
        status="*-gate/*",
    ),
    _step(
        "publish", "Signs and stores releases and the verdicts on them.",
        ["releases/*", "attestations/*/verdict-*"], repairs=["releases/*"], signs=True,
    ),
    Role(
        "trainyard-doctor", "steps", "Proves an image on a device, or says what is in it.",
        writes=("proofs/*", "toolchains/*", _PROBE),
        deletes=(_PROBE,),
        uploads=(_PROBE,),
        signs=True,
    ),
    Role(
        "trainyard-gc", "steps", "Deletes what nobody needs any more.",
        writes=(_ALL_LOCKS, _PROBE),
        deletes=(
            "plans/*", "evals/*", "checkpoints/*", "bundles/*", "measurements/*", "samples/*",
            "references/*", "verdicts/*", "reports/*", "releases/*", "rollouts/*", "status/*",
            _ALL_LOCKS, _PROBE,
        ),
        # It ends uploads that nobody goes on with.
        uploads=("checkpoints/*", "bundles/*", "evals/*", _PROBE),
    ),
    Role(
        "trainyard-airflow-worker", "airflow", "Plans releases, starts steps, settles rollouts.",
        writes=(
            "plans/*", "evals/*", "refreshes/*", "locks/*/plan.json",
            # Also of a pod that was killed before it could write the end of its step.
            "status/*",
            *_ROLLOUT_WRITES, _PROBE,
        ),
        # The watch of a channel keeps its last states only.
        deletes=("rollouts/*/watch/*", _PROBE),
        uploads=("evals/*", _PROBE),
        logs="writes",
    ),
    Role(
        "trainyard-airflow-triggerer", "airflow", "Drives rollouts: promotes and rolls back.",
        writes=(*_ROLLOUT_WRITES, _PROBE),
        deletes=(_PROBE,),
        uploads=(_PROBE,),
        logs="writes",
    ),
    Role("trainyard-airflow-api-server", "airflow", "Shows what is there.", logs="reads"),
    Role("trainyard-serving", "serving", "Restores releases."),
    Role(
        "trainyard-guard", "serving", "Reads channels, notes what it did by itself.",
        writes=("rollouts/*/events/guard-*", _PROBE),
        deletes=(_PROBE,),
        uploads=(_PROBE,),
    ),
)  # fmt: skip
"""Every role that touches the store."""


@dataclass(frozen=True)
class Account:
    """The AWS account and the clusters that policies are made for."""

    bucket: str
    prefix: str
    """Of the store in the bucket; empty: the bucket is the store."""
    region: str
    roles: str
    """How the ARNs of the roles begin, such as `arn:aws:iam::111122223333:role/main`."""
    clusters: tuple[tuple[str, Mapping[Where, str]], ...] = field(default=())
    """OIDC provider, and namespaces by what runs in them, of each cluster or environment."""
    store_kms_key: str = ""
    """ARN of the key that encrypts the store's objects; empty: S3's own."""
    signing_kms_key: str = ""
    """ARN of the key that signs releases; empty: none."""
    logs: str = ""
    """Where Airflow keeps the logs of tasks, as `bucket/prefix`; empty: not in S3."""

    @property
    def partition(self) -> str:
        """`aws`, or that of a region apart, such as `aws-cn`."""
        return self.roles.split(":")[1]

    @property
    def bucket_arn(self) -> str:
        """The bucket as a resource."""
        return f"arn:{self.partition}:s3:::{self.bucket}"

    def keys(self, patterns: Iterable[str]) -> list[str]:
        """Return patterns of keys as resources."""
        folder = f"{self.prefix}/" if self.prefix else ""
        return [f"{self.bucket_arn}/{folder}{each}" for each in patterns]

    def role_arn(self, role: Role) -> str:
        """Return the ARN of a role."""
        return f"{self.roles}-{role.account}"


def policies(account: Account) -> dict[str, Any]:
    """Return all policies as they are given to AWS.

    Returns:
        `roles`: by role name the trust policy (`trust`) and the permissions (`permissions`);
        `bucket_policy`: of the bucket.
    """
    return {
        "roles": {
            account.role_arn(role).rpartition("/")[2]: {
                "trust": _document(_trust(account, role)),
                "permissions": _document(permissions(account, role)),
            }
            for role in ROLES
        },
        "bucket_policy": _document(bucket_policy(account)),
    }


def _document(statements: list[dict[str, Any]]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": statements}


def _trust(account: Account, role: Role) -> list[dict[str, Any]]:
    """Return who may take a role: its service account, in every cluster."""
    owner = account.roles.split(":")[4]
    return [
        {
            "Effect": "Allow",
            "Principal": {
                "Federated": f"arn:{account.partition}:iam::{owner}:oidc-provider/{provider}"
            },
            "Action": "sts:AssumeRoleWithWebIdentity",
            "Condition": {
                "StringEquals": {
                    f"{provider}:aud": "sts.amazonaws.com",
                    f"{provider}:sub": f"system:serviceaccount:{namespace}:{role.account}",
                }
            },
        }
        for provider, namespace in sorted(
            {(provider, places[role.where]) for provider, places in account.clusters}
        )
    ]


def permissions(account: Account, role: Role) -> list[dict[str, Any]]:
    """Return the statements of a role's own policy."""
    statements = [
        _allow("Read", ["s3:GetObject"], account.keys(["*"])),
        {
            **_allow("List", ["s3:ListBucket"], [account.bucket_arn]),
            # `IfExists`: a request for one key that is missing is answered 404 only to those who
            # may list, and carries no prefix.
            "Condition": {"StringLikeIfExists": {"s3:prefix": _list_prefixes(account)}},
        },
    ]
    if role.writes:
        statements.append(_allow("Write", ["s3:PutObject"], account.keys(role.writes)))
    if role.deletes:
        statements.append(_allow("Delete", ["s3:DeleteObject"], account.keys(role.deletes)))
    if role.uploads:
        parts = ["s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
        statements += [
            _allow("Parts", parts, account.keys(role.uploads)),
            _allow("Uploads", ["s3:ListBucketMultipartUploads"], [account.bucket_arn]),
        ]
    if account.store_kms_key:
        actions = ["kms:Decrypt", *(["kms:GenerateDataKey"] if role.writes else [])]
        via = {"kms:ViaService": f"s3.{account.region}.{_domain(account.partition)}"}
        statements.append(
            {
                **_allow("Encryption", actions, [account.store_kms_key]),
                "Condition": {"StringEquals": via},
            }
        )
    if role.logs and account.logs:
        bucket = account.logs.partition("/")[0]
        actions = ["s3:GetObject", *(["s3:PutObject"] if role.logs == "writes" else [])]
        resource = f"arn:{account.partition}:s3:::{account.logs}/*"
        listed = [f"arn:{account.partition}:s3:::{bucket}"]
        statements += [
            _allow("Logs", actions, [resource]),
            _allow("ListLogs", ["s3:ListBucket"], listed),
        ]
    if role.signs and account.signing_kms_key:
        actions = ["kms:Sign", "kms:GetPublicKey"]
        statements.append(_allow("Sign", actions, [account.signing_kms_key]))
    return statements


def _domain(partition: str) -> str:
    return "amazonaws.com.cn" if partition == "aws-cn" else "amazonaws.com"


def _list_prefixes(account: Account) -> list[str]:
    return [account.prefix, f"{account.prefix}/*"] if account.prefix else ["*"]


def _allow(sid: str, actions: Sequence[str], resources: Sequence[str]) -> dict[str, Any]:
    return {
        "Sid": sid,
        "Effect": "Allow",
        "Action": list(actions),
        "Resource": list(resources),
    }


def bucket_policy(account: Account) -> list[dict[str, Any]]:
    """Return the statements of the bucket's policy; all of them deny."""
    everything = [account.bucket_arn, f"{account.bucket_arn}/*"]
    created = {"Bool": {"s3:ObjectCreationOperation": "true"}}
    absent = {"s3:if-none-match": "true"}
    statements = [
        _deny("TlsOnly", ["s3:*"], everything, {"Bool": {"aws:SecureTransport": "false"}}),
        # Parts of an upload and its beginning carry no condition; its end does, and creates.
        _deny(
            "WrittenOnce", ["s3:PutObject"], account.keys(WRITTEN_ONCE), {"Null": absent, **created}
        ),
        _deny(
            "Compared",
            ["s3:PutObject"],
            account.keys(COMPARED),
            {"Null": {**absent, "s3:if-match": "true"}, **created},
        ),
    ]
    for sid, action, of in (
        ("Writers", "s3:PutObject", lambda role: role.writes),
        ("Deleters", "s3:DeleteObject", lambda role: role.deletes),
    ):
        statements += [
            _deny(
                f"{sid}{number}",
                [action],
                account.keys(patterns),
                {"ArnNotLike": {"aws:PrincipalArn": list(arns)}} if arns else {},
            )
            for number, (arns, patterns) in enumerate(_by_holders(account, of), start=1)
        ]
    if account.store_kms_key:
        header = "s3:x-amz-server-side-encryption-aws-kms-key-id"
        statements.append(
            _deny(
                "OneKey",
                ["s3:PutObject"],
                account.keys(["*"]),
                # Requests that name no key get the bucket's own.
                {"StringNotEquals": {header: account.store_kms_key}, "Null": {header: "false"}},
            )
        )
    return statements


def _by_holders(account: Account, of: Any) -> list[tuple[tuple[str, ...], list[str]]]:
    """Return the kinds of keys by the roles that have a right on any of them."""
    found: dict[tuple[str, ...], list[str]] = {}
    for kind in KEYS:
        folder = kind.partition("/")[0]
        holders = tuple(
            account.role_arn(role)
            for role in ROLES
            if any(pattern.partition("/")[0] == folder for pattern in of(role))
        )
        found.setdefault(holders, []).append(kind)
    return list(found.items())


def _deny(
    sid: str, actions: Sequence[str], resources: Sequence[str], condition: Mapping[str, Any]
) -> dict[str, Any]:
    statement = {
        "Sid": sid,
        "Effect": "Deny",
        "Principal": "*",
        "Action": list(actions),
        "Resource": list(resources),
    }
    return {**statement, "Condition": dict(condition)} if condition else statement
