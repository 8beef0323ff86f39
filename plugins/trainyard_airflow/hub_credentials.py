"""The Hub's token out of an Airflow connection, for the steps that read sources."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

if TYPE_CHECKING:
    from trainyard.settings import Settings

SOURCE_STEPS = frozenset({"plan", "download"})
"""Only these reach a model's source; no other step gets a token."""


def hub_settings(settings: Settings) -> Settings:
    """Return the settings with the token and endpoint of the Hub's connection, if one is named.

    For tasks that ask a source themselves. Raises StepRefused as `hub_credentials`.
    """
    found = hub_credentials(settings.hub_connection)
    if not found:
        return settings
    changes: dict[str, Any] = {"hub_token": SecretStr(found["TRAINYARD_HUB_TOKEN"])}
    if "TRAINYARD_HUB_ENDPOINT" in found:
        changes["hub_endpoint"] = found["TRAINYARD_HUB_ENDPOINT"]
    return settings.model_copy(update=changes)


def hub_credentials(connection_id: str) -> dict[str, str]:
    """Return the connection's token and endpoint as environment variables of a step.

    They go into the step's environment only: a command line can be seen by every user of the
    machine, and is logged. Airflow masks the password of a connection in its logs.

    Args:
        connection_id: what TRAINYARD_HUB_CONNECTION names; empty: nothing is returned.

    Raises:
        StepRefused: there is no such connection, or it has no password.
    """
    if not connection_id:
        return {}
    from airflow.sdk import BaseHook
    from airflow.sdk.exceptions import AirflowNotFoundException

    from trainyard_airflow.exceptions import StepRefused

    try:
        connection = BaseHook.get_connection(connection_id)
    except AirflowNotFoundException:
        raise StepRefused(
            f"There is no connection {connection_id!r}, which TRAINYARD_HUB_CONNECTION names."
        ) from None
    if not connection.password:
        raise StepRefused(
            f"Connection {connection_id!r} (TRAINYARD_HUB_CONNECTION) has no password; put the "
            "Hub's token there."
        )
    env = {"TRAINYARD_HUB_TOKEN": connection.password}
    if connection.host:
        host = connection.host
        env["TRAINYARD_HUB_ENDPOINT"] = host if "://" in host else f"https://{host}"
    return env
