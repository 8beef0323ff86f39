"""The guard and the proxy as Deployments of `k8s/`, on a real cluster, with servers that are fakes.

What must hold whoever dies: without a driver, and with the store out of reach, traffic is back on
stable at most `BACK_S` after the lease has ended; `TAKE_OVER_S` more if the leading guard goes too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.data_plane import KINDS, all_ready, deployed
from tests.cluster.place import REPOSITORY, Place, away, wait_for
from tests.serving_world import ENVIRONMENT, MODEL, NEW, OLD, make_channel, put_channel

from trainyard.kubernetes.client import Object
from trainyard.kubernetes.kinds import HTTP_ROUTE, LEASE, POD
from trainyard.kubernetes.labels import RELEASE, owned, route_name
from trainyard.serving.kubernetes.channel_init import init_channel
from trainyard.serving.kubernetes.guard import ELECTION
from trainyard.serving.kubernetes.lease import KubernetesLease
from trainyard.serving.kubernetes.route import record_of, split_weights
from trainyard.spec.environments import Environment
from trainyard.spec.kubernetes import KubernetesServing
from trainyard.store.folder import FolderStore

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

BACK_S = 30.0
TAKE_OVER_S = 15.0
LEASE_S = 12.0
NAME = route_name(MODEL, ENVIRONMENT)
ASK = """
import collections, json, sys, urllib.request
seen = collections.Counter()
for _ in range(int(sys.argv[2])):
    request = urllib.request.Request(
        sys.argv[1] + "/v1/completions",
        json.dumps({"model": "adder", "prompt": "x", "tokens": 1}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()
        seen[answer.headers["x-trainyard-release"]] += 1
print(json.dumps(seen))
"""


@dataclass(frozen=True)
class World:
    """A channel in the middle of a rollout, with guards, a proxy and two servers."""

    here: Place
    store: FolderStore
    place: KubernetesServing
    lease: KubernetesLease

    @property
    def route(self) -> Object:
        found = self.here.cluster.get(HTTP_ROUTE, NAME, self.here.namespace)
        assert found is not None
        return found

    @property
    def weights(self) -> dict[str, int]:
        return {name: weight for name, weight in split_weights(self.route).items() if weight}

    def wish(self, weight: int, generation: int, **changes: Any) -> None:
        """Write a wish into the channel, as the driver of a rollout does."""
        put_channel(self.store, make_channel(weight=weight, generation=generation, **changes))

    def drive(self, duration_s: float) -> float:
        """Renew the rollout's lease; return when it will have ended (monotonic seconds)."""
        self.lease.renew(ENVIRONMENT, MODEL, holder="test", duration_s=duration_s)
        return time.monotonic() + duration_s

    def follows(self, **weights: int) -> None:
        """Wait until the route has these weights, in percent of `stable` and `candidate`."""
        wanted = {
            name: weight
            for name, weight in ((OLD, weights["stable"]), (NEW, weights["candidate"]))
            if weight
        }
        wait_for(
            lambda: self.weights == wanted,
            f"the weights {wanted}",
            timeout_s=90,
            interval_s=0.2,
            explain=lambda: (record_of(self.route), self.logs("guard")),
        )

    def leader(self) -> str:
        """Return who leads the guards: the name of its pod and something after a dash."""
        found = self.here.cluster.get(LEASE, ELECTION, self.here.namespace)
        return str(((found or {}).get("spec") or {}).get("holderIdentity") or "")

    def logs(self, component: str) -> str:
        pods = self.here.pods({"app.kubernetes.io/component": component})
        names = [pod["metadata"]["name"] for pod in pods]
        return "\n".join(
            f"{name}: {self.here.cluster.logs(name, self.here.namespace, tail_lines=20)}"
            for name in names
        )

    def ask(self, count: int) -> dict[str, int]:
        """Send requests through the proxy from a pod; return how many each release answered."""
        (pod,) = self.here.pods({"app.kubernetes.io/component": "proxy"})
        url = f"http://{pod['status']['podIP']}:8080/{ENVIRONMENT}/{MODEL}"
        name = f"ask-{time.monotonic_ns()}"
        said = self.here.run(name, [self.here.python, "-c", ASK, url, str(count)])
        return dict(json.loads(said))


@pytest.fixture(scope="module")
def world(here: Place, shared: Path) -> Iterator[World]:
    """Guards and proxy run, the servers are ready, the route is made."""
    folder = shared / "traffic"
    folder.mkdir(mode=0o777)
    settings = {**here.pod_settings, "data_plane": "proxy"}
    environment = {"platform": "kubernetes", "target": "cpu", "kubernetes": settings}
    file = folder / "environments.yaml"
    written = {"schema": "trainyard/v1", "environments": {ENVIRONMENT: environment}}
    file.write_text(yaml.safe_dump(written))
    place = Environment.model_validate(environment).kubernetes
    assert place is not None
    store = FolderStore(folder / "store")
    made = World(here, store, place, KubernetesLease(here.cluster, here.namespace))
    variables = {
        "TRAINYARD_STORE": str(folder / "store"),
        "TRAINYARD_ENVIRONMENTS": str(file),
        "TRAINYARD_S3_REGION": "",
    }
    objects = deployed(here, variables)
    for each in objects:
        here.cluster.apply(KINDS[each["kind"]], each)
    servers = [server(here, release_id) for release_id in (OLD, NEW)]
    for each in servers:
        here.cluster.create(POD, each)
    try:
        # A candidate that is not ready when it gets traffic blows the guard's fuse.
        for component in ("server", "guard", "proxy"):
            all_ready(here, component)
        made.wish(0, 1)
        init_channel(here.cluster, MODEL, ENVIRONMENT, place)
        yield made
    finally:
        here.cluster.delete(HTTP_ROUTE, NAME, here.namespace)
        for name in (NAME, ELECTION):
            here.cluster.delete(LEASE, name, here.namespace)
        for each in (*objects, *servers):
            kind = KINDS.get(each["kind"], POD)
            here.cluster.delete(kind, each["metadata"]["name"], here.namespace)


def server(here: Place, release_id: str) -> Object:
    """Return the pod of a fake server."""
    fake = [str(REPOSITORY / "tests" / "fake_vllm.py"), "--host=0.0.0.0", "--port=8000"]
    pod = here.pod(release_id, [here.python, *fake, f"--name={release_id}"])
    labels = owned("server", model=MODEL, environment=ENVIRONMENT)
    pod["metadata"]["labels"] = {**labels, RELEASE: release_id}
    (container,) = pod["spec"]["containers"]
    container["ports"] = [{"name": "http", "containerPort": 8000}]
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 1}
    container["readinessProbe"] = probe
    return pod


def test_the_proxy_splits_traffic_as_the_guard_writes_it(world: World) -> None:
    world.drive(300)
    world.wish(30, 2)
    world.follows(stable=70, candidate=30)
    wait_for(lambda: set(world.ask(40)) == {OLD, NEW}, "both releases to be asked")
    world.wish(0, 3)
    world.follows(stable=100, candidate=0)
    wait_for(lambda: set(world.ask(20)) == {OLD}, "the candidate to be left alone")


def test_what_somebody_else_writes_into_the_route_stays_but_for_weights(world: World) -> None:
    world.drive(300)
    world.wish(20, 4)
    world.follows(stable=80, candidate=20)
    theirs = {
        "matches": [{"path": {"type": "PathPrefix", "value": "/theirs"}}],
        "backendRefs": [{"name": "theirs", "port": 80, "weight": 1}],
    }
    rules = [theirs, *world.route["spec"]["rules"]]
    change = [{"op": "replace", "path": "/spec/rules", "value": rules}]
    world.here.cluster.json_patch(
        HTTP_ROUTE, NAME, change, namespace=world.here.namespace, manager="somebody"
    )
    world.wish(40, 5)
    world.follows(stable=60, candidate=40)
    found = world.route["spec"]["rules"]
    kept = [rule["backendRefs"] for rule in found if rule["matches"] == theirs["matches"]]
    # The API server fills in what a backend is by default.
    assert [[(each["name"], each["weight"]) for each in refs] for refs in kept] == [[("theirs", 1)]]
    change = [{"op": "replace", "path": "/spec/rules", "value": rules[1:]}]
    world.here.cluster.json_patch(
        HTTP_ROUTE, NAME, change, namespace=world.here.namespace, manager="somebody"
    )
    world.follows(stable=60, candidate=40)


def test_a_rollout_without_a_driver_loses_its_traffic_with_the_store_away(world: World) -> None:
    world.drive(300)
    world.wish(50, 6)
    world.follows(stable=50, candidate=50)
    with away(world.store.root):
        ended = world.drive(LEASE_S)
        back_s = went_back(world, ended)
    print(f"\nback {back_s:.1f} s after the lease ended")
    assert 0 <= back_s <= BACK_S
    assert record_of(world.route).memory.guard == "lease_expired"
    wait_for(lambda: set(world.ask(20)) == {OLD}, "the candidate to be left alone")
    assert record_of(world.route).memory.guard == "lease_expired"


def test_so_it_does_when_the_leading_guard_is_killed(world: World) -> None:
    world.wish(50, 7, number=2)
    world.drive(300)
    world.follows(stable=50, candidate=50)
    leader = wait_for(world.leader, "a leading guard", explain=lambda: world.logs("guard"))
    with away(world.store.root):
        ended = world.drive(LEASE_S)
        time.sleep(max(0.0, ended - time.monotonic() - 1))
        world.here.kill(leader.rpartition("-")[0])
        back_s = went_back(world, ended)
    print(f"\nback {back_s:.1f} s after the lease ended, with the leader killed")
    assert 0 <= back_s <= BACK_S + TAKE_OVER_S
    wait_for(lambda: world.leader() not in {"", leader}, "another leader")


def went_back(world: World, ended: float) -> float:
    """Wait until all traffic is on stable; return seconds since the lease ended."""
    wait_for(
        lambda: world.weights == {OLD: 100},
        "all traffic on stable",
        timeout_s=120,
        interval_s=0.2,
        explain=lambda: (record_of(world.route), world.logs("guard")),
    )
    return time.monotonic() - ended
