"""What tests of refreshes start from: a catalogue on a Hub, a store, and an Airflow that counts."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.hub_server import HubServer
from tests.unit.sources.hub_world import model as model_files
from tests.unit.yard import SPEC

from trainyard.refresh.check import Refresher, Runs
from trainyard.settings import Settings
from trainyard.spec.environments import Environments
from trainyard.store.factory import open_store
from trainyard.store.protocol import Store

NOW = datetime(2026, 11, 23, 3, 0, tzinfo=UTC)
"""A Monday."""

ENVIRONMENTS: dict[str, Any] = {
    "schema": "trainyard/v1",
    "environments": {"staging": {"target": "cpu"}, "production": {"target": "cpu"}},
}


@dataclass
class FakeRuns:
    """The runs of `neuron_release` that an Airflow has; it allows each id once."""

    states: dict[str, str] = field(default_factory=dict)
    started: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)
    refuses: Exception | None = None
    """Raised instead of starting a run: the process dies there."""
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def state(self, run_id: str) -> str:
        return self.states.get(run_id, "")

    def start(self, run_id: str, conf: Mapping[str, Any], note: str) -> bool:
        with self._mutex:
            if self.refuses is not None:
                raise self.refuses
            if run_id in self.states:
                return False
            self.states[run_id] = "queued"
            self.started.append((run_id, dict(conf), note))
            return True


def write_spec(folder: Path, model: str, **refresh: Any) -> None:
    """Write the spec of a model that is on the Hub and refreshed (`cron=None`: never)."""
    spec = {
        **SPEC,
        "model": model,
        "source": {"kind": "huggingface", "repo": f"yard/{model}"},
        "refresh": {"cron": "0 3 * * *", "environments": ["production"], **refresh},
    }
    if refresh.get("cron", "") is None:
        del spec["refresh"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{model}.yaml").write_text(json.dumps(spec, indent=1))


@dataclass
class RefreshWorld:
    """An installation with a Hub."""

    folder: Path
    hub: HubServer
    runs: FakeRuns = field(default_factory=FakeRuns)
    environments: dict[str, Any] = field(default_factory=lambda: ENVIRONMENTS)
    now: datetime = NOW

    @property
    def settings(self) -> Settings:
        return Settings(
            home=self.folder / "home",
            catalogue=self.folder / "models",
            environments=self.folder / "environments.yaml",
            hub_endpoint=self.hub.url,
            source_attempts=1,
            source_timeout_s=10,
        )

    @property
    def store(self) -> Store:
        return open_store(self.settings)

    def add(self, model: str, **refresh: Any) -> str:
        """Put a model on the Hub and into the catalogue; returns its commit."""
        write_spec(self.folder / "models", model, **refresh)
        return self.commit(model)

    def commit(self, model: str, fill: int = 0) -> str:
        """Put other weights on the Hub; returns the new commit."""
        return self.hub.add(f"yard/{model}", model_files(fill=fill))

    def refresher(self, runs: Runs | None = None, **changes: Any) -> Refresher:
        """Return what a new process would use."""
        return Refresher(
            self.settings,
            self.store,
            Environments.model_validate_json(json.dumps(self.environments)),
            self.runs if runs is None else runs,
            asked_by="neuron_refresh__adder/scheduled",
            now=lambda: self.now,
            **changes,
        )

    def frozen(self, environment: str, hours: float) -> None:
        """Freeze an environment from now on."""
        window = {
            "start": self.now.isoformat(),
            "end": (self.now + timedelta(hours=hours)).isoformat(),
            "reason": "end of the year",
        }
        every = dict(self.environments["environments"])
        every[environment] = {**every[environment], "freeze": [window]}
        self.environments = {**self.environments, "environments": every}
