"""Rollouts under streaming clients: the real agent, proxy, driver and judge, and fake servers.

Everything runs on this machine and nothing of Airflow. Plans are short: what takes minutes in
production takes seconds here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.integration.serving.conftest import Yard
from tests.serving_world import (
    ENVIRONMENT,
    MODEL,
    PATIENCE_S,
    FakeLane,
    eventually,
    make_release,
)

from trainyard.documents.channel import Channel
from trainyard.documents.release import Release
from trainyard.lanes.protocol import ServerCommand
from trainyard.rollout.channel_store import read_channel
from trainyard.rollout.driver import DriveResult
from trainyard.rollout.rollouts import Rollouts, Tick
from trainyard.serving.agent import Agent, means_of, stop_all_servers
from trainyard.settings import Settings
from trainyard.wiring import open_rollout

ENVIRONMENTS = """
schema: trainyard/v1
environments:
  staging: {target: cpu, devices: 2, rollback_window_s: 0}
"""

QUICK: dict[str, Any] = {
    "steps": [{"weight": 20, "hold_s": 1}, {"weight": 50, "hold_s": 2}],
    "bake_s": 1,
    "max_duration_s": 240,
    "max_hold_s": 60,
    "warm_up_requests": 2,
    "deploy_timeout_s": 120,
    "judge": {
        "block_s": 1,
        "min_requests_per_block": 5,
        # Wide, so that a busy machine is no reason for anything.
        "margins": {
            "ttft": {"harm": 5.0, "promote": 6.0},
            "tpot": {"harm": 5.0, "promote": 6.0},
            "errors": {"harm": 10.0, "promote": 10.0, "harm_floor": 0.2, "promote_ceiling": 0.4},
            "ttft_tail": {
                "harm": 10.0,
                "promote": 10.0,
                "harm_floor": 0.4,
                "promote_ceiling": 0.49,
            },
        },
    },
}

SLOW_S = 1.2
"""Seconds to the first token of a release whose revision begins with `slow`."""


class RevisionLane(FakeLane):
    """A lane whose servers are as slow as the revision of their model says."""

    def command(self, target: Any, *, model_dir: Path, **others: Any) -> ServerCommand:
        command = super().command(target, model_dir=model_dir, **others)
        slow = (model_dir / "weights").read_bytes().startswith(b"slow")
        return ServerCommand((*command.argv, f"--first-s={SLOW_S if slow else 0.02}"), command.env)


@dataclass(frozen=True)
class Answer:
    """What a client got for a request."""

    sent: float
    """Seconds since 1970."""
    release: str
    problem: str
    """Empty: a whole stream, in order."""


@dataclass
class StreamYard:
    """A home with all that serves, and clients."""

    yard: Yard
    rollouts: Rollouts
    answers: list[Answer] = field(default_factory=list)
    url: str = ""

    @property
    def settings(self) -> Settings:
        return self.yard.settings

    @property
    def channel(self) -> Channel:
        return read_channel(self.yard.store, MODEL, ENVIRONMENT)

    def publish(self, revision: str, **rollout: Any) -> Release:
        """Publish a release; revisions that begin with `slow` are."""
        changes = {"rollout": {**QUICK, **rollout}}
        return make_release(self.settings, self.yard.store, revision, **changes)

    def promote(self, release: Release, *, run_id: str = "") -> Tick:
        """Begin a promotion and return its tick."""
        return self.rollouts.begin(
            kind="promote",
            model=MODEL,
            environment=ENVIRONMENT,
            release_id=release.release_id,
            run_id=run_id or f"run-{release.revision}",
        )

    def drive(self, tick: Tick, *, until: Any = None, limit_s: float = 600.0) -> DriveResult:
        """Tick until the rollout is over, or something is true of its channel."""
        end = time.monotonic() + limit_s
        while True:
            result = tick()
            if result.done or (until is not None and until(result.channel)):
                return result
            assert time.monotonic() < end, result.summary
            time.sleep(result.next_in_s)

    def first(self, revision: str = "first") -> Release:
        """Promote a first release, start the proxy, and wait until it answers clients."""
        release = self.publish(revision)
        tick = self.promote(release)
        self.drive(tick, until=lambda c: c.stable is not None)
        self.url = f"{self.yard.start_proxy()}/{ENVIRONMENT}/{MODEL}/v1/completions"
        eventually(
            lambda: httpx.post(self.url, json={}, timeout=PATIENCE_S).status_code == 200,
            why="a route",
        )
        assert self.drive(tick).outcome == "promoted"
        return release

    @contextlib.contextmanager
    def clients(self, rate: float, *, at_least: int = 0) -> Iterator[list[Answer]]:
        """Let clients ask `rate` times a second while the block runs, and until they have asked
        `at_least` times."""
        stop = threading.Event()
        answers: list[Answer] = []
        thread = threading.Thread(
            target=lambda: asyncio.run(_ask_all(self.url, rate, at_least, stop, answers))
        )
        thread.start()
        try:
            yield answers
        finally:
            stop.set()
            thread.join()


async def _ask_all(
    url: str, rate: float, at_least: int, stop: threading.Event, answers: list[Answer]
) -> None:
    tasks: set[asyncio.Task[None]] = set()
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(timeout=PATIENCE_S, limits=limits) as client:
        asked = 0
        begun = time.monotonic()
        while not stop.is_set() or asked < at_least:
            due = int((time.monotonic() - begun) * rate) + 1
            # A machine that was busy for a while must not be flooded afterwards.
            for _ in range(min(due - asked, 3)):
                task = asyncio.create_task(_ask(client, url, answers))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                asked += 1
            if due - asked > 3:
                begun = time.monotonic() - asked / rate
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*tasks)


async def _ask(client: httpx.AsyncClient, url: str, answers: list[Answer]) -> None:
    sent, release, problem = time.time(), "", ""
    asked = {"stream": True, "tokens": 4, "delay_s": 0.02}
    try:
        async with client.stream("POST", url, json=asked) as response:
            release = response.headers.get("x-trainyard-release", "")
            data = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
            problem = _problem(response.status_code, data)
    except httpx.HTTPError as error:
        problem = f"{type(error).__name__}: {error}"
    answers.append(Answer(sent, release, problem))


def _problem(status: int, data: list[str]) -> str:
    if status != httpx.codes.OK:
        return f"status {status}"
    tokens = [json.loads(each)["token"] for each in data[:-1]]
    if data[-1:] != ["[DONE]"] or tokens != [0, 1, 2, 3]:
        return f"a cut stream: {data}"
    return ""


@contextlib.contextmanager
def stream_yard(folder: Path, **settings: Any) -> Iterator[StreamYard]:
    """Have an agent whose lane starts fake servers, and rollouts with this home's wiring."""
    environments = folder / "environments.yaml"
    environments.write_text(ENVIRONMENTS)
    values = {"guard_interval_s": 0.1, "drain_timeout_s": 20, **settings}
    yard = Yard(Settings(home=folder / "home", environments=environments, **values))
    means = means_of(yard.settings, yard.store, lambda name: RevisionLane())
    stop = threading.Event()
    agent = threading.Thread(target=Agent(means).run, args=(stop,))
    agent.start()
    try:
        yield StreamYard(yard, open_rollout(yard.settings))
    finally:
        stop.set()
        agent.join(timeout=PATIENCE_S)
        yard.end()
        stop_all_servers(yard.settings)
        means.http.close()
