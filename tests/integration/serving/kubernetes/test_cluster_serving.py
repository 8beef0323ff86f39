"""Guards and a proxy as processes of a cluster, between real clients and servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.cluster_world import NAME, place, put_pod, service, weights_of
from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster
from tests.serving_world import (
    ENVIRONMENT,
    MODEL,
    NEW,
    OLD,
    PATIENCE_S,
    FakeServer,
    eventually,
    make_channel,
    put_channel,
    start_fake,
)

from trainyard.kubernetes.kinds import HTTP_ROUTE, LEASE, POD
from trainyard.kubernetes.labels import owned
from trainyard.serving.guard_events import guard_events
from trainyard.serving.kubernetes.channel_init import init_channel
from trainyard.serving.kubernetes.guard import ELECTION
from trainyard.serving.kubernetes.lease import KubernetesLease
from trainyard.serving.kubernetes.route import find_rule
from trainyard.serving.kubernetes.route_status import KubernetesRouter
from trainyard.serving.protocol import RouteStatus
from trainyard.serving.records import choose_port
from trainyard.settings import Settings
from trainyard.store.folder import FolderStore

pytestmark = pytest.mark.integration

PLACE = place(data_plane="proxy")
ENVIRONMENTS = {
    "schema": "trainyard/v1",
    "environments": {
        ENVIRONMENT: {
            "platform": "kubernetes",
            "target": "cpu",
            "kubernetes": {"namespace": NS, "data_plane": "proxy"},
        }
    },
}


@dataclass
class Yard:
    """A fake cluster, a store, and processes."""

    fake: FakeCluster
    home: Path
    servers: list[FakeServer] = field(default_factory=list)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    generation: int = 0
    url: str = ""

    @property
    def settings(self) -> Settings:
        return Settings(home=self.home)

    @property
    def store(self) -> FolderStore:
        return FolderStore(self.settings.store_root)

    @property
    def router(self) -> KubernetesRouter:
        return KubernetesRouter(self.fake.client(), PLACE)

    @property
    def lease(self) -> KubernetesLease:
        return KubernetesLease(self.fake.client(), NS)

    def run(self, name: str, *arguments: str, **settings: str) -> None:
        """Start a process of ours."""
        self.home.mkdir(exist_ok=True)
        kubeconfig, environments = self.home / "kubeconfig", self.home / "environments.yaml"
        kubeconfig.write_text(self.fake.kubeconfig())
        environments.write_text(json.dumps(ENVIRONMENTS))
        variables = {
            "TRAINYARD_HOME": str(self.home),
            "TRAINYARD_KUBECONFIG": str(kubeconfig),
            "TRAINYARD_ENVIRONMENTS": str(environments),
            "TRAINYARD_LISTEN_HOST": "127.0.0.1",
            "TRAINYARD_GUARD_PORT": "0",
            "TRAINYARD_GUARD_INTERVAL_S": "0.2",
            "TRAINYARD_GUARD_STORE_INTERVAL_S": "0.2",
            **settings,
        }
        with (self.home / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                (sys.executable, "-m", "trainyard", *arguments),
                env={**os.environ, **variables},
                stdout=log,
                stderr=log,
            )

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text()

    def leader(self) -> str:
        """Return the name of the guard that leads."""
        lease = self.fake.get(LEASE, ELECTION)
        holder = lease["spec"]["holderIdentity"] if lease else ""
        found = [n for n in self.processes if holder and f"{holder} guards" in self.log(n)]
        return found[0] if found else ""

    def wish(self, weight: int, **changes: Any) -> None:
        self.generation += 1
        put_channel(self.store, make_channel(weight=weight, generation=self.generation, **changes))

    def followed(self, old: int, new: int) -> RouteStatus:
        """Wait until the route has these weights and the proxy does what it says."""

        def found() -> RouteStatus | None:
            status = self.router.status(ENVIRONMENT, MODEL)
            return status if status and status.weights == {OLD: old, NEW: new} else None

        return eventually(found, why=f"{old}/{new}: {weights_of(self.fake)}")

    def ask(self, number: int) -> Counter[str]:
        """Ask for answers; return how many each release gave."""
        with httpx.Client(timeout=PATIENCE_S) as client:
            answers = [
                client.post(f"{self.url}/completions", json={"tokens": 1}) for _ in range(number)
            ]
        assert {answer.status_code for answer in answers} == {200}
        return Counter(answer.headers["x-trainyard-release"] for answer in answers)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for server in self.servers:
            server.process.stop(0)


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    """Two releases with a server each, a proxy, and the channel's route."""
    with FakeCluster.running() as fake:
        made = Yard(fake, tmp_path / "home")
        try:
            client_port, status_port = choose_port(), choose_port()
            made.run(
                "proxy",
                "proxy",
                "--follow-route",
                TRAINYARD_FOLLOW_PORT=str(client_port),
                TRAINYARD_GUARD_PORT=str(status_port),
            )
            made.run("guard-1", "guard", ENVIRONMENT)
            init_channel(fake.client(), MODEL, ENVIRONMENT, PLACE)
            for release_id in (OLD, NEW):
                server = start_fake(made.settings, release_id)
                made.servers.append(server)
                assert server.record.port is not None
                put_pod(fake, release_id, port=server.record.port)
            ports = [{"name": "status", "containerPort": status_port}]
            fake.put(
                POD,
                {
                    "metadata": {"name": "proxy-0", "labels": owned("proxy")},
                    "spec": {"containers": [{"name": "proxy", "ports": ports}]},
                    "status": {
                        "podIP": "127.0.0.1",
                        "conditions": [{"type": "Ready", "status": "True"}],
                    },
                },
            )
            made.url = f"http://127.0.0.1:{client_port}/{ENVIRONMENT}/{MODEL}/v1"
            yield made
        finally:
            made.end()


def test_a_canary_and_its_rollback(yard: Yard) -> None:
    yard.lease.renew(ENVIRONMENT, MODEL, holder="run#1", duration_s=600)
    yard.wish(10)
    yard.followed(90, 10)
    answers = yard.ask(100)
    assert abs(answers[NEW] - 10) <= 2
    status = yard.followed(90, 10)
    assert status.traffic[NEW].arrivals == answers[NEW]
    assert (status.guard, status.channel_generation) == ("following", 1)

    # A client may name its track, and is not counted.
    pinned = httpx.post(
        f"{yard.url}/completions", json={}, headers={"x-trainyard-track": "candidate"}
    )
    assert pinned.headers["x-trainyard-release"] == NEW
    assert yard.followed(90, 10).traffic[NEW].arrivals == answers[NEW]

    # Streams come piece by piece, and the proxy's own pages are not for clients.
    asked = {"stream": True, "tokens": 3, "delay_s": 0.05}
    with httpx.stream("POST", f"{yard.url}/completions", json=asked) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    own = httpx.get(yard.url.replace(f"/{ENVIRONMENT}/{MODEL}/v1", "/-/metrics"))
    assert own.status_code == 404

    # Somebody adds a rule and moves a weight: the weight is set again, the rule stays.
    def edit(body: dict[str, Any]) -> None:
        find_rule(body, "split")[1]["backendRefs"][1]["weight"] = 900
        body["spec"]["rules"].append({"name": "docs", "backendRefs": [{"name": "docs"}]})

    yard.fake.edit(HTTP_ROUTE, NAME, edit)
    yard.followed(90, 10)
    assert weights_of(yard.fake, "docs") == {"docs": 1}

    # While the API is away, everything is served as before.
    yard.fake.down = True
    yard.fake.cut_watches()
    assert set(yard.ask(50)) == {OLD, NEW}
    yard.fake.down = False

    yard.wish(0, phase="rolling_back")
    arrived = yard.followed(100, 0).traffic[NEW].arrivals
    assert yard.ask(50) == {OLD: 50}
    assert yard.followed(100, 0).traffic[NEW].arrivals == arrived
    for name in ("proxy", "guard-1"):
        yard.processes[name].send_signal(signal.SIGTERM)
        code = yard.processes[name].wait(timeout=PATIENCE_S)
        assert code in (0, -signal.SIGTERM), yard.log(name)


def test_a_client_of_the_proxy_may_be_idle_for_longer_than_clients_keep_connections(
    yard: Yard,
) -> None:
    yard.wish(0)
    yard.followed(100, 0)
    connections = []
    with httpx.Client(limits=httpx.Limits(keepalive_expiry=None), timeout=PATIENCE_S) as client:
        for pause_s in (0.0, 5.5):
            time.sleep(pause_s)
            answer = client.post(f"{yard.url}/completions", json={"tokens": 1})
            assert answer.status_code == 200
            connections.append(answer.extensions["network_stream"].get_extra_info("client_addr"))
    assert connections[0] == connections[1]


def test_traffic_comes_back_without_driver_store_and_leader(yard: Yard) -> None:
    yard.run("guard-2", "guard", ENVIRONMENT)
    yard.lease.renew(ENVIRONMENT, MODEL, holder="run#1", duration_s=600)
    yard.wish(30)
    yard.followed(70, 30)
    eventually(lambda: "guards" in yard.log("guard-2"))
    eventually(lambda: yard.fake.open_watches >= 8, why="both guards and the proxy")

    # Airflow goes, then the store, then the guard that leads.
    yard.lease.renew(ENVIRONMENT, MODEL, holder="run#1", duration_s=3)
    store = yard.settings.store_root
    store.rename(yard.home / "store-that-is-away")
    store.write_text("no folder, so nobody can read or write here")
    leader = eventually(yard.leader)
    yard.processes[leader].kill()
    yard.followed(100, 0)
    assert yard.ask(20) == {OLD: 20}
    other = eventually(yard.leader)
    assert other != leader
    assert weights_of(yard.fake) == {service(OLD): 100, service(NEW): 0}

    # The store is back, and learns of it.
    store.unlink()
    (yard.home / "store-that-is-away").rename(store)
    events = eventually(lambda: guard_events(yard.store, MODEL, ENVIRONMENT, 1))
    assert [event.event for event in events] == ["lease_expired"]
