"""The Hub's token out of an Airflow connection, for the steps that read sources."""

from __future__ import annotations

SOURCE_STEPS = frozenset({"plan", "download"})
"""Only these reach a model's source; no other step gets a token."""


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
