"""What the embedded platform consists of: one record a process."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainyard.platform import postgres
from trainyard.platform.environment import airflow_environment, airflow_program, base_environment
from trainyard.platform.paths import PlatformPaths, load_choices
from trainyard.settings import Settings


@dataclass(frozen=True)
class Component:
    """A process that the supervisor keeps alive."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path


def database_components(settings: Settings) -> Sequence[Component]:
    """Return the processes that must run before the database can be migrated."""
    if settings.airflow_database == "sqlite":
        return ()
    paths = PlatformPaths(settings.home.resolve())
    return (
        Component(
            "postgres", tuple(postgres.server_argv(paths)), base_environment(), paths.postgres
        ),
    )


def service_components(settings: Settings) -> Sequence[Component]:
    """Return the processes that need a migrated database."""
    paths = PlatformPaths(settings.home.resolve())
    env = airflow_environment(settings, load_choices(settings))
    airflow = airflow_program()
    # Scheduler and triggerer would serve their logs on every interface; here all of Airflow reads
    # them from the same disk.
    airflow_parts = [
        Component("api-server", (airflow, "api-server"), env, paths.airflow),
        Component("scheduler", (airflow, "scheduler", "--skip-serve-logs"), env, paths.airflow),
        Component("dag-processor", (airflow, "dag-processor"), env, paths.airflow),
        Component("triggerer", (airflow, "triggerer", "--skip-serve-logs"), env, paths.airflow),
    ]
    own_parts = [
        Component(name, (sys.executable, "-m", "trainyard", name), env, paths.run)
        for name in ("agent", "proxy")
    ]
    return (*own_parts, *airflow_parts)


def migrate_argv() -> tuple[str, ...]:
    """Return the command that brings the metadata database to this Airflow's schema."""
    return (airflow_program(), "db", "migrate")
