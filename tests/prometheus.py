"""Debian's Prometheus with the configuration of `docker-compose.yaml`, without a container.

What differs: the addresses (free ports of loopback in place of the containers'), how often it
scrapes, and the receiver of OTLP, which Debian's version does not have.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.serving_world import PATIENCE_S, eventually

from trainyard.serving.records import choose_port

REPOSITORY = Path(__file__).parents[1]
MONITORING = REPOSITORY / "k8s" / "monitoring"


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str
    log: Path

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the result of an instant query: dicts with `metric` and `value`."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def value(self, expression: str) -> float | None:
        """Return the value of the one series of a query; None while there is none."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else None

    def alerts(self) -> dict[str, list[dict[str, Any]]]:
        """Return the state of every alerting rule, by name."""
        groups = self._get("rules")["groups"]
        return {rule["name"]: rule["alerts"] for group in groups for rule in group["rules"]}

    def targets(self) -> dict[str, list[str]]:
        """Return the health of the targets, by job."""
        found: dict[str, list[str]] = {}
        for each in self._get("targets")["activeTargets"]:
            found.setdefault(each["labels"]["job"], []).append(each["health"])
        return found

    def _get(self, what: str, **asked: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/api/v1/{what}", params=asked, timeout=PATIENCE_S)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()["data"]
        return found


def configuration(text: str, ports: Mapping[int, int], every: str) -> str:
    """Return prometheus.yml for other ports, scraping every so often.

    Args:
        text: of the file.
        ports: of this machine, by the containers'.
        every: such as `1s`.
    """
    for ours, free in ports.items():
        text = text.replace(f"127.0.0.1:{ours}", f"127.0.0.1:{free}")
    names = "scrape_interval|scrape_timeout|refresh_interval|evaluation_interval"
    return re.sub(rf"({names}): \w+", rf"\1: {every}", text)


def flags(folder: Path, port: int) -> list[str]:
    """Return the flags of the compose service, for files below `folder`."""
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yaml").read_text())
    changed = {
        "--config.file": str(folder / "prometheus.yml"),
        "--storage.tsdb.path": str(folder / "data"),
    }
    found = []
    for flag in compose["services"]["prometheus"]["command"]:
        name, _, value = flag.partition("=")
        if name != "--web.enable-otlp-receiver":
            found.append(f"{name}={changed.get(name, value)}")
    return [*found, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]


@contextmanager
def prometheus(folder: Path, ports: Mapping[int, int], every: str = "1s") -> Iterator[Prometheus]:
    """Run Prometheus; `ports` has this machine's by those of the containers."""
    program = shutil.which("prometheus")
    assert program, "Debian's package prometheus is not installed: see .ci/system-packages"
    folder.mkdir(parents=True)
    port = choose_port()
    text = (MONITORING / "prometheus.yml").read_text()
    config = configuration(text, {**ports, 9090: port}, every)
    (folder / "prometheus.yml").write_text(config)
    (folder / "rules").symlink_to(MONITORING / "rules")
    log = folder / "prometheus.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [program, *flags(folder, port)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    try:
        running = Prometheus(f"http://127.0.0.1:{port}", log)

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            with suppress(httpx.HTTPError):
                return httpx.get(f"{running.url}/-/ready").status_code == 200
            return False

        eventually(ready, why="Prometheus is ready")
        yield running
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE_S)
