"""Every setting of Trainyard, read from `TRAINYARD_*` environment variables.

Each attribute's docstring gives its meaning, unit and the reason for its default.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """The configuration of one Trainyard installation."""

    model_config = SettingsConfigDict(
        env_prefix="TRAINYARD_", frozen=True, extra="ignore", use_attribute_docstrings=True
    )

    home: Path = Field(default_factory=lambda: Path.cwd() / ".trainyard")
    """Folder of everything the embedded platform keeps: store, servers, logs, Airflow's files."""

    store: str = ""
    """Where documents, checkpoints and bundles live: a folder. Empty: `store` below the home."""

    catalogue: Path = Field(default_factory=lambda: Path.cwd() / "dags" / "models")
    """Folder of the model specs, one `<model>.yaml` each."""

    environments: Path = Field(default_factory=lambda: Path.cwd() / "dags" / "environments.yaml")
    """File that describes the environments."""

    work: Path | None = None
    """Scratch folder of running steps; may be lost at any time. Empty: `work` below the home."""

    node_cache: Path | None = None
    """Folder for files of releases that everything on this machine shares, for `trainyard
    materialize`. Empty: files go straight from the store to where they are served from."""

    node_cache_gib: float = Field(default=0.0, ge=0)
    """GiB (2**30 bytes) that the node cache may hold; what is least recently used goes first.
    0: as much as its disk."""

    serve_python: Path | None = None
    """Python interpreter of the serving environment (vLLM). Empty means `.venv-serve/bin/python`
    beside the home, else the running interpreter."""

    step_lock_s: float = 120.0
    """Seconds after which a step's lock expires unless its holder renews it. Renewed every third of
    it; long enough for a stalled disk, short enough that a killed step can be retried soon."""

    step_lock_wait_s: float = 30.0
    """Seconds a step waits for somebody else's lock before it exits with 75."""

    server_start_timeout_s: float = 600.0
    """Seconds a server may take from its start to its first healthy answer."""

    drain_timeout_s: float = 60.0
    """Seconds a server may take to finish running requests before it is stopped."""

    proxy_port: int = 0
    """Port of the local proxy on loopback; 0 chooses a free one and keeps it for later starts."""

    airflow_port: int = 0
    """Port of the embedded Airflow on loopback; 0 chooses a free one and keeps it."""

    airflow_database: Literal["postgresql", "sqlite"] = "postgresql"
    """Metadata database of the embedded Airflow. SQLite needs no server, but fails under concurrent
    API calls."""

    guard_interval_s: float = 0.5
    """Seconds between two reconciliations of the local route with the channel's wishes."""

    signing_key: SecretStr = SecretStr("")
    """Base64 of the 32-byte Ed25519 seed that signs releases. Empty means a key file below the
    home, made at first use."""

    requested_by: str = ""
    """Who asked for the work, for provenance; the DAGs set it to the user of the run."""

    dag_run: str = ""
    """The Airflow run the work belongs to, for provenance; the DAGs set it."""

    @property
    def store_root(self) -> Path:
        """The folder behind `store`."""
        return Path(self.store) if self.store else self.home / "store"

    @property
    def work_root(self) -> Path:
        """The folder behind `work`."""
        return self.work or self.home / "work"

    @property
    def serving_interpreter(self) -> Path:
        """The interpreter behind `serve_python`."""
        if self.serve_python is not None:
            return self.serve_python
        beside = self.home.parent / ".venv-serve" / "bin" / "python"
        return beside if beside.exists() else Path(sys.executable)


@cache
def get_settings() -> Settings:
    """Return the settings of this process, read once from the environment."""
    return Settings()
