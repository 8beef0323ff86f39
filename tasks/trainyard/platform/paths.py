"""Where the embedded platform keeps its files, and which port and secrets it has chosen."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from trainyard.serving.process import free_port
from trainyard.settings import Settings


@dataclass(frozen=True)
class PlatformPaths:
    """Folders and files of one home."""

    home: Path

    @property
    def run(self) -> Path:
        """Process ids, sockets, ports: what describes the running platform."""
        return self.home / "run"

    @property
    def logs(self) -> Path:
        """One log file a component."""
        return self.home / "logs"

    @property
    def airflow(self) -> Path:
        """AIRFLOW_HOME; also the working folder of Airflow's components."""
        return self.home / "airflow"

    @property
    def choices_file(self) -> Path:
        """Ports and secrets, chosen once."""
        return self.run / "platform.json"

    @property
    def supervisor_file(self) -> Path:
        """What the supervisor runs."""
        return self.run / "supervisor.json"

    @property
    def supervisor_lock(self) -> Path:
        """Held by the one supervisor of this home."""
        return self.run / "supervisor.lock"

    @property
    def postgres(self) -> Path:
        """PostgreSQL's cluster.

        Its server refuses to run as root and then runs as the user `postgres`, who may not be able
        to enter this home (a clone below /root, say); root keeps the cluster where that user can.
        """
        if os.geteuid() != 0:
            return self.home / "postgres"
        name = hashlib.sha256(str(self.home.resolve()).encode()).hexdigest()[:12]
        return Path("/var/lib/trainyard") / name

    def make(self) -> None:
        """Create the folders that components expect."""
        for folder in (self.run, self.logs, self.airflow):
            folder.mkdir(parents=True, exist_ok=True)


class Choices(BaseModel):
    """What was chosen at the first start and must stay the same afterwards."""

    api_port: int
    admin_password: str
    fernet_key: str
    jwt_secret: str
    api_secret_key: str

    @property
    def api_url(self) -> str:
        """Where Airflow's UI and REST API listen."""
        return f"http://127.0.0.1:{self.api_port}"


def load_choices(settings: Settings) -> Choices:
    """Return the choices of this home; make them at the first call (the file is private)."""
    paths = PlatformPaths(settings.home)
    paths.make()
    try:
        return Choices.model_validate_json(paths.choices_file.read_bytes())
    except FileNotFoundError:
        choices = Choices(
            api_port=settings.airflow_port or free_port(),
            admin_password=secrets.token_urlsafe(9),
            fernet_key=base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            jwt_secret=secrets.token_urlsafe(32),
            api_secret_key=secrets.token_urlsafe(32),
        )
        temporary = paths.choices_file.with_suffix(f".{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(choices.model_dump(), stream, indent=2)
        temporary.replace(paths.choices_file)
        return choices
