"""Agent, proxy and servers together, as they run on the platform."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import httpx
import pytest
from tests.integration.serving.conftest import Yard
from tests.serving_world import (
    ENVIRONMENT,
    MODEL,
    PATIENCE_S,
    FakeLane,
    eventually,
    make_channel,
    make_release,
    put_channel,
)

from trainyard.serving.agent import Agent, means_of, stop_all_servers
from trainyard.serving.lease import FileLease
from trainyard.serving.local_host import LocalHost
from trainyard.serving.records import ServingPaths, observed_servers

pytestmark = pytest.mark.integration


@pytest.fixture
def running(yard: Yard) -> Iterator[Yard]:
    """A home with an agent, whose lane starts fake servers, and a proxy."""
    means = means_of(yard.settings, yard.store, lambda name: FakeLane())
    stop = threading.Event()
    agent = threading.Thread(target=Agent(means).run, args=(stop,))
    agent.start()
    yield yard
    stop.set()
    agent.join(timeout=PATIENCE_S)
    stop_all_servers(yard.settings)
    means.http.close()


def states(host: LocalHost) -> list[str]:
    return [server.state for server in host.servers(ENVIRONMENT, MODEL)]


def listens(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=PATIENCE_S)
    except httpx.ConnectError:
        return False
    except httpx.TransportError:
        pass
    return True


def restarts(host: LocalHost) -> int:
    return sum(server.restarts for server in host.servers(ENVIRONMENT, MODEL))


def test_clients_see_nothing_of_a_crash_or_a_removal(running: Yard) -> None:
    host = LocalHost(running.settings)
    old, new = (make_release(running.settings, running.store, name) for name in ("v1", "v2"))
    host.deploy(ENVIRONMENT, old, 2)
    host.deploy(ENVIRONMENT, new, 1)
    FileLease(running.settings).renew(ENVIRONMENT, MODEL, holder="test", duration_s=300)
    eventually(lambda: states(host).count("ready") == 3, why="three servers are ready")
    channel = make_channel(stable=old.release_id, candidate=new.release_id, weight=50)
    put_channel(running.store, channel)
    url = f"{running.start_proxy()}/{ENVIRONMENT}/{MODEL}/v1/completions"
    eventually(
        lambda: httpx.post(url, json={}, timeout=PATIENCE_S).status_code == 200,
        why="the route exists",
    )

    def ask(times: int) -> set[str]:
        answers = [client.post(url, json={"tokens": 1}) for _ in range(times)]
        assert {answer.status_code for answer in answers} == {200}
        return {answer.headers["x-trainyard-release"] for answer in answers}

    with httpx.Client(timeout=PATIENCE_S) as client:
        assert ask(10) == {old.release_id, new.release_id}

        victim = next(
            s for s in observed_servers(ServingPaths.of(running.settings)) if s.name.endswith("-1")
        )
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        # Until the kernel is done with it, it still takes requests that nobody answers.
        eventually(lambda: not listens(victim.url), why="the kernel is done with it")
        ask(20)
        eventually(lambda: restarts(host) == 1 and states(host).count("ready") == 3, why="3 again")

        put_channel(
            running.store,
            make_channel(stable=old.release_id, candidate=new.release_id, weight=0, generation=2),
        )
        eventually(lambda: running.status(MODEL).channel_generation == 2, why="the route follows")
        host.remove(ENVIRONMENT, new.release_id)
        while len(states(host)) > 2:
            assert ask(5) == {old.release_id}
