"""Credentials of an Airflow connection (type `aws`), for the store and the steps.

They go from Airflow's secrets to a step through its environment only: not through its command line,
its log, a document or XCom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard_airflow.exceptions import StepRefused

if TYPE_CHECKING:
    from trainyard.settings import Settings
    from trainyard.store.protocol import Store
    from trainyard.store.s3_client import AwsCredentials


def connection_credentials(settings: Settings) -> AwsCredentials | None:
    """Return the credentials of the connection that the settings name, or None if they name none.

    Amazon's own hook reads the connection, so that roles, sessions and profiles work as anywhere in
    Airflow. The credentials of a role live as long as its session: set `role_arn`'s duration to the
    longest step, or let the step's retry go on with new ones.

    Raises:
        StepRefused: there is no such connection, or it yields no credentials.
    """
    if not settings.aws_connection:
        return None
    from airflow.providers.amazon.aws.hooks.base_aws import AwsGenericHook
    from airflow.sdk.exceptions import AirflowException, AirflowNotFoundException
    from botocore.exceptions import BotoCoreError, ClientError

    from trainyard.store.s3_client import AwsCredentials

    try:
        # The default of a connection that is missing would be boto3's own chain, without a word.
        AwsGenericHook.get_connection(settings.aws_connection)
        session = AwsGenericHook(aws_conn_id=settings.aws_connection, client_type="s3").get_session(
            region_name=settings.s3_region or None
        )
        found = session.get_credentials()
        keys = found.get_frozen_credentials() if found is not None else None
    except AirflowNotFoundException as error:
        raise StepRefused(
            f"There is no connection {settings.aws_connection!r}, which TRAINYARD_AWS_CONNECTION "
            "names. Make it, or correct the setting."
        ) from error
    except (AirflowException, BotoCoreError, ClientError) as error:
        raise StepRefused(
            f"Connection {settings.aws_connection!r} yields no credentials: {error}"
        ) from error
    if keys is None:
        raise StepRefused(
            f"Connection {settings.aws_connection!r} yields no credentials. Give it an access key "
            "or a role."
        )
    return AwsCredentials(
        access_key_id=keys.access_key,
        secret_access_key=keys.secret_key,
        session_token=keys.token or "",
        region=session.region_name or "",
    )


def connection_environment(settings: Settings) -> dict[str, str]:
    """Return the variables that give a step the credentials of the connection; none without one.

    Raises StepRefused.
    """
    found = connection_credentials(settings)
    if found is None:
        return {}
    values = {
        "AWS_ACCESS_KEY_ID": found.access_key_id,
        "AWS_SECRET_ACCESS_KEY": found.secret_access_key,
        "AWS_SESSION_TOKEN": found.session_token,
        "AWS_REGION": found.region,
        "AWS_DEFAULT_REGION": found.region,
    }
    return {name: value for name, value in values.items() if value}


def open_task_store(settings: Settings) -> Store:
    """Return the store as a task of Airflow reaches it. Raises BadInput, StepRefused."""
    from trainyard.store.factory import open_store

    return open_store(settings, connection_credentials(settings))
