"""Who looks at the page, and what they may do: the only module that uses Airflow's own security.

None of it is a declared public interface of Airflow (3.3), so nothing else imports it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Act = Literal["read", "start", "mark", "answer"]
"""What somebody may do with the runs of a DAG: see them, start one, mark a task of one, answer what
a task asks people."""


class Access(Protocol):
    """Where the page learns who asks and what they may do."""

    @property
    def user(self) -> Callable[..., Awaitable[Any]]:
        """A dependency of FastAPI that returns the user, or answers 401."""

    def may(self, user: Any, act: Act, dag_id: str) -> bool:
        """Tell whether `user` may do this with the runs of the DAG. Blocks."""


@dataclass(frozen=True)
class AirflowAccess:
    """Airflow's login and its auth manager, whichever that is."""

    @property
    def user(self) -> Callable[..., Awaitable[Any]]:
        """Airflow's own dependency: the session cookie, or a bearer token."""
        from airflow.api_fastapi.core_api.security import get_user

        return get_user

    def may(self, user: Any, act: Act, dag_id: str) -> bool:
        """Ask the auth manager what Airflow's own API would ask it."""
        from airflow.api_fastapi.app import get_auth_manager
        from airflow.api_fastapi.auth.managers.models.resource_details import (
            DagAccessEntity,
            DagDetails,
        )

        rights: dict[Act, tuple[Any, DagAccessEntity]] = {
            "read": ("GET", DagAccessEntity.RUN),
            "start": ("POST", DagAccessEntity.RUN),
            "mark": ("PUT", DagAccessEntity.TASK_INSTANCE),
            "answer": ("PUT", DagAccessEntity.HITL_DETAIL),
        }
        method, entity = rights[act]
        return bool(
            get_auth_manager().is_authorized_dag(
                method=method,
                access_entity=entity,
                details=DagDetails(id=dag_id, team_name=_team_of(dag_id)),
                user=user,
            )
        )


def _team_of(dag_id: str) -> str | None:
    from airflow.configuration import conf

    if not conf.getboolean("core", "multi_team", fallback=False):
        return None
    from airflow.models.dag import DagModel

    name: str | None = DagModel.get_team_name(dag_id)
    return name
