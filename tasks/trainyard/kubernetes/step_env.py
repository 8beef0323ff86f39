"""The variables of Trainyard that a step in a pod gets: settings that mean something there.

An allow-list: paths of this machine mean nothing in a pod, and secrets go another way.
"""

from __future__ import annotations

from trainyard.errors import BadInput
from trainyard.settings import Settings

PASSED_ON = (
    "s3_endpoint_url",
    "s3_region",
    "s3_addressing_style",
    "s3_kms_key_id",
    "s3_bucket_key",
    "s3_expected_bucket_owner",
    "s3_checksum",
    "s3_part_bytes",
    "s3_timeout_s",
    "s3_attempts",
    "step_lock_s",
    "step_lock_wait_s",
    "server_start_timeout_s",
    "drain_timeout_s",
    "builder_id",
    "hub_endpoint",
    "source_timeout_s",
    "source_attempts",
)
"""Settings that every step gets, where they were set."""

SIGNING_STEPS = frozenset({"publish"})


def step_environment(
    settings: Settings, *, step: str, dag_run: str, requested_by: str
) -> dict[str, str]:
    """Return the variables of a step's pod, none of them secret.

    Args:
        settings: of Airflow's side.
        step: the step.
        dag_run: the run that it belongs to.
        requested_by: who asked for it; may be empty.
    """
    env = {
        "TRAINYARD_STORE": settings.store_name,
        "TRAINYARD_DAG_RUN": dag_run,
        "TRAINYARD_REQUESTED_BY": requested_by,
    }
    for name in PASSED_ON:
        if name in settings.model_fields_set:
            value = getattr(settings, name)
            env[f"TRAINYARD_{name.upper()}"] = _text(value)
    if step in SIGNING_STEPS and settings.signing_kms_key:
        env["TRAINYARD_SIGNING_KMS_KEY"] = settings.signing_kms_key
    return env


def check_signing(env: dict[str, str], *, secrets: bool) -> None:
    """Make sure that a pod which publishes has a key that outlives it.

    Args:
        env: of the pod.
        secrets: does the place bring variables out of Secrets?

    Raises:
        BadInput: it would make a key of its own, which nobody trusts, and lose it.
    """
    if "TRAINYARD_SIGNING_KMS_KEY" not in env and not secrets:
        raise BadInput(
            "A pod that publishes has no key to sign with.",
            hint="Set TRAINYARD_SIGNING_KMS_KEY, or name a Secret with TRAINYARD_SIGNING_KEY in "
            "steps.env_from_secrets.",
        )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
