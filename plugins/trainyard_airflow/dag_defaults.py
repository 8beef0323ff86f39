"""What all of Trainyard's DAGs have in common: defaults, tags, params of their forms.

Read when DAG files are parsed, so it opens only two small things on this machine: the list of
specs and the environments file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from airflow.sdk import Param
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference

from trainyard.names import NAME_PATTERN, RELEASE_ID_PATTERN, REVISION_PATTERN
from trainyard.settings import get_settings
from trainyard.spec.environments import Environment
from trainyard.spec.kubernetes import KubernetesSteps
from trainyard.spec.loader import Catalogue, load_environments
from trainyard.spec.outline import RefreshOutline, refresh_outlines
from trainyard.spec.ways import Allowed

OWNER = "ml-platform"
START_DATE = datetime(2026, 1, 1, tzinfo=UTC)

DEFAULT_ARGS: dict[str, Any] = {
    "owner": OWNER,
    "retries": 0,
    "retry_delay": timedelta(seconds=15),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=10),
    "execution_timeout": timedelta(minutes=10),
}
"""Tasks are not retried unless they say so: steps do, with a policy; rollouts must not."""


OFFERED_RELEASES = 50
"""Releases that forms suggest, newest first."""

RELEASE_STUCK_AFTER = timedelta(days=2)
"""When a release that has not ended counts as stuck: longer than its longest steps together."""


class Tag(StrEnum):
    """Every tag a DAG of ours may carry."""

    TRAINYARD = "trainyard"
    RELEASE = "release"
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    TRAFFIC = "traffic"
    """It moves production traffic."""
    REFRESH = "refresh"
    STORE = "store"
    """It looks after the store."""


def catalogue_models() -> list[str]:
    """Return the names of the models in the catalogue."""
    return Catalogue(get_settings().catalogue).names()


def refreshed_models() -> list[RefreshOutline]:
    """Return the models of the catalogue that are refreshed."""
    return refresh_outlines(get_settings().catalogue)


def environments() -> Mapping[str, Environment]:
    """Return the environments, in the order in which releases pass through them."""
    return load_environments(get_settings().environments).environments


def may_release() -> Allowed | None:
    """Return who may make releases; None: whoever Airflow lets start the DAG."""
    return load_environments(get_settings().environments).release


def steps_place() -> KubernetesSteps | None:
    """Return where heavy steps run as pods; None: as processes of the worker."""
    return load_environments(get_settings().environments).steps


def model_param() -> Param:
    """Return the form field for a model of the catalogue."""
    names = catalogue_models()
    # A catalogue without models still needs a form that Airflow accepts.
    choice: dict[str, Any] = {"enum": names} if names else {"pattern": NAME_PATTERN}
    return Param(
        names[0] if names else "no-model-yet",
        type="string",
        title="Model",
        description_md="A model of the catalogue (`dags/models`).",
        section="What",
        **choice,
    )


def known_releases() -> list[str]:
    """Return the ids of the newest releases, where the store is a folder of this machine.

    A store in S3 is not asked: DAG files are parsed all the time, and need no network.
    """
    settings = get_settings()
    if "://" in settings.store:
        return []
    found = [
        (file.stat().st_mtime_ns, file.stem)
        for file in (settings.store_root / "releases").glob("*/*.json")
        if re.fullmatch(RELEASE_ID_PATTERN, file.stem)
    ]
    return [name for _, name in sorted(found, reverse=True)[:OFFERED_RELEASES]]


def stuck_alert(after: timedelta, environment: str = "") -> DeadlineAlert:
    """Return the deadline of a DAG's runs: whoever wants to know is told when one is late.

    Args:
        after: counted from when a run was queued.
        environment: that it is about.
    """
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=after,
        callback=AsyncCallback(
            "trainyard_airflow.notify.tell_stuck", kwargs={"environment": environment}
        ),
        name="stuck",
    )


def promotion_stuck_after(environment: Environment) -> timedelta:
    """Return how long a promotion may take: the time for an approval comes on top."""
    approval_s = environment.approval.timeout_s if environment.approval is not None else 0.0
    return timedelta(seconds=environment.stuck_after_s + approval_s)


def release_param(default: str | None, *, optional: bool) -> Param:
    """Return the form field for a release id, with the newest ones as suggestions."""
    releases = known_releases()
    suggested: dict[str, Any] = {"examples": releases} if releases else {}
    return Param(
        default,
        type=["null", "string"] if optional else "string",
        pattern=RELEASE_ID_PATTERN,
        title="Release",
        description_md="A release id: the model's name and 12 hex digits, as "
        "`trainyard releases MODEL` prints it."
        + (" Empty: undo the last promotion." if optional else ""),
        section="What",
        **suggested,
    )


def revision_param() -> Param:
    """Return the form field for a revision of the source."""
    return Param(
        None,
        type=["null", "string"],
        pattern=REVISION_PATTERN,
        title="Revision",
        description_md="A revision of the model's source. Empty: the one its spec names, or else "
        "the newest.",
        section="What",
    )


def wait_for_window_param() -> Param:
    """Return the form field that says what a promotion does in a freeze or in quiet hours."""
    return Param(
        False,
        type="boolean",
        title="Wait for a window",
        description_md="While the environment is frozen, or in its quiet hours: wait until that is "
        "over. Otherwise the promotion is refused then.",
        section="Where",
    )


def reason_param(what: str) -> Param:
    """Return the form field for the reason of a change."""
    return Param(
        None,
        type=["null", "string"],
        maxLength=500,
        title="Reason",
        description_md=what,
        section="Why",
    )
