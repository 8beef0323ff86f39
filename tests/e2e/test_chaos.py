"""What happens to a rollout when a process is killed in the middle of it.

For each kind of process a rollout is started, and as soon as its candidate has real traffic, the
process is killed with SIGKILL. Then this must hold:

- the killed process is back after a while, or what replaces it is;
- the rollout ends by itself: promoted, rolled back or withdrawn, with a stable release that
  answers;
- at no moment (looked at twice a second) does the candidate have traffic while the rollout's lease
  is not alive.

Run one of them with `pytest -s -m soak tests/e2e/test_chaos.py -k triggerer`. Setting up takes some
minutes; with CHAOS_HOME=/tmp/chaos in the environment the platform stays up for the next run
(`trainyard down` with TRAINYARD_HOME=/tmp/chaos/home ends it). A table is printed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from rich.console import Console
from rich.table import Table
from tests.platform_world import (
    MODEL,
    PROMOTE,
    RELEASE,
    Platform,
    Watch,
    needs_everything,
    note,
    running_platform,
    wait_for,
)

from trainyard.documents.channel import Channel, Rollout
from trainyard.documents.look import Look
from trainyard.platform.control import up
from trainyard.platform.supervisor import read_components
from trainyard.releases import list_releases
from trainyard.serving.records import ObservedServer, ServingPaths, observed_servers
from trainyard.store.documents import read_document

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800), needs_everything]

REQUESTS_PER_S = 10.0
EXPOSED_WITHIN_S = 180.0
BACK_WITHIN_S = 300.0
ENDED_WITHIN_S = 600.0
COMPONENTS = ("scheduler", "dag-processor", "api-server", "triggerer", "proxy", "agent", "postgres")


@dataclass(frozen=True)
class Row:
    """What became of one kill."""

    killed: str
    back_s: float
    outcome: str
    ended_s: float
    """Seconds from the kill to the outcome."""
    sent: int
    errors: int
    guards: str
    reason: str


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    """The table, printed after the last test."""
    made: list[Row] = []
    yield made
    table = Table(title="Killed while a candidate had traffic", title_justify="left")
    for heading in ("Killed", "Back", "Rollout", "Ended", "Requests", "Errors", "Guard", "Why"):
        table.add_column(heading, overflow="fold")
    for row in made:
        table.add_row(
            row.killed,
            f"{row.back_s:.0f} s",
            row.outcome,
            f"{row.ended_s:.0f} s",
            str(row.sent),
            str(row.errors),
            row.guards,
            row.reason,
        )
    Console(width=150).print(table, markup=False)


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    """A platform with a stable release, a second published one, and clients."""
    kept = os.environ.get("CHAOS_HOME")
    if kept is None:
        with running_platform(hold_s=(20, 20), bake_s=10) as made:
            prepare(made)
            yield made
        return
    folder = Path(kept)
    folder.mkdir(parents=True, exist_ok=True)
    made = Platform.make(folder, hold_s=(20, 20), bake_s=10)
    made.start()
    prepare(made)
    yield made
    made.stop_traffic()


def prepare(platform: Platform) -> None:
    """Publish two releases unless they exist, make one of them stable, and let clients come."""
    wait_for_idle(platform)
    published = {release.revision for release in list_releases(platform.store, MODEL)}
    stamp = int(time.time())
    for revision in sorted({"r1", "r2"} - published):
        platform.need(revision)
        assert platform.release(f"chaos-{revision}-{stamp}", revision)
    for revision in sorted({"r1", "r2"} - published):
        assert platform.ended(RELEASE, f"chaos-{revision}-{stamp}") == "success"
    if not platform.stable:
        release_id = release_ids(platform)[0]
        run_id = f"chaos-first-{stamp}"
        assert platform.trigger(PROMOTE, run_id, model=MODEL, release=release_id)
        assert platform.ended(PROMOTE, run_id) == "success", platform.describe(PROMOTE, run_id)
    platform.start_traffic(REQUESTS_PER_S)


def wait_for_idle(platform: Platform) -> None:
    """Wait until no rollout is under way."""
    wait_for(
        lambda: not platform.channel.in_progress,
        "the end of an earlier rollout",
        timeout_s=ENDED_WITHIN_S,
    )


def release_ids(platform: Platform) -> list[str]:
    """The releases of r1 and r2 as the spec serves them."""
    found = {r.revision: r.release_id for r in list_releases(platform.store, MODEL)}
    return [found["r1"], found["r2"]]


# --- a rollout ------------------------------------------------------------------------------------


def promote_the_other(platform: Platform, name: str) -> tuple[str, int]:
    """Start a rollout of the release that is not stable; returns its run and its number."""
    (other,) = set(release_ids(platform)) - {platform.stable}
    return promote(platform, name, other)


def promote(platform: Platform, name: str, other: str) -> tuple[str, int]:
    """Start a rollout of a release; returns its run and its number.

    One that a failed test left behind is waited for first.
    """
    wait_for_idle(platform)
    before = platform.channel.rollout
    number = before.number + 1 if before else 1
    run_id = f"chaos-{name}-{int(time.time())}"
    # An earlier kill may have cost it its good name.
    assert platform.trigger(PROMOTE, run_id, model=MODEL, release=other, force=True, reason="chaos")
    return run_id, number


def exposed(platform: Platform, number: int) -> bool:
    """Whether the candidate of a rollout has traffic by now."""
    channel, route = platform.channel, platform.route
    rollout = channel.rollout
    if rollout is None or rollout.number != number:
        return False
    assert rollout.outcome is None, f"it ended too soon: {rollout.reason}"
    if channel.candidate is None or route is None:
        return False
    release_id = channel.candidate.release_id
    traffic = route.traffic.get(release_id)
    return route.weights.get(release_id, 0) > 0 and traffic is not None and traffic.arrivals > 3


def outcome(platform: Platform, number: int) -> Rollout | None:
    """Return the rollout if it has ended."""
    rollout = platform.channel.rollout
    if rollout is None or rollout.number != number or rollout.outcome is None:
        return None
    return rollout


def play(
    platform: Platform,
    rows: list[Row],
    name: str,
    kill: Callable[[], Callable[[], bool]],
) -> Rollout:
    """Start a rollout, kill something when its candidate has traffic, and see how it ends.

    Args:
        platform: where.
        rows: takes what became of it.
        name: what is killed.
        kill: kills it, and returns what tells whether it is back.
    """
    clients = platform.clients
    with Watch(platform) as watch:
        run_id, number = promote_the_other(platform, name)
        wait_for(
            lambda: exposed(platform, number),
            "traffic of the candidate",
            timeout_s=EXPOSED_WITHIN_S,
        )
        is_back = kill()
        killed_at = time.monotonic()
        note(f"killed: {name}")
        ended: Rollout | None = None
        back_s = ended_s = None
        while back_s is None or ended is None:
            lasted_s = time.monotonic() - killed_at
            if back_s is None and is_back():
                back_s = lasted_s
                note(f"back after {back_s:.0f} s: {name}")
            if ended is None:
                ended = outcome(platform, number)
                ended_s = lasted_s
            assert back_s is not None or lasted_s < BACK_WITHIN_S, f"{name} is not back"
            assert ended is not None or lasted_s < ENDED_WITHIN_S, platform.describe(
                PROMOTE, run_id
            )
            time.sleep(0.5)
        assert ended_s is not None
    now = platform.clients
    row = Row(
        killed=name,
        back_s=back_s,
        outcome=str(ended.outcome),
        ended_s=ended_s,
        sent=now.sent - clients.sent,
        errors=now.errors - clients.errors,
        guards=", ".join(sorted(watch.guards - {"following"})) or "-",
        reason=ended.reason,
    )
    rows.append(row)
    note(str(row))
    check_end(platform, watch, platform.channel, run_id, ended)
    return ended


def check_end(
    platform: Platform, watch: Watch, channel: Channel, run_id: str, ended: Rollout
) -> None:
    """Demand what must hold after every kill."""
    assert watch.exposed_samples > 0
    assert watch.violations == []
    assert channel.stable is not None
    assert channel.candidate is None
    assert channel.weights.candidate == 0
    expected = ended.release_id if ended.outcome == "promoted" else ended.reference_id
    assert channel.stable.release_id == expected

    def stable_answers() -> bool:
        with contextlib.suppress(Exception):
            return platform.ask()[1] == expected
        return False

    wait_for(stable_answers, "an answer of the stable release", timeout_s=180)
    state = platform.ended(PROMOTE, run_id, timeout_s=300)
    assert state == ("success" if ended.outcome == "promoted" else "failed")
    assert platform.traffic is not None
    assert platform.traffic.poll() is None


# --- components -----------------------------------------------------------------------------------


def component(platform: Platform, name: str) -> psutil.Process | None:
    """Return the process of a component, if it runs now."""
    pid = read_components(platform.paths).get(name, {}).get("pid")
    with contextlib.suppress(psutil.NoSuchProcess):
        if isinstance(pid, int):
            process = psutil.Process(pid)
            return process if process.status() != psutil.STATUS_ZOMBIE else None
    return None


def healthy(platform: Platform) -> bool:
    """Whether the proxy and all parts of Airflow say that they are healthy."""
    assert platform.address is not None
    try:
        httpx.get(f"{platform.address.proxy_url}/-/health", timeout=5).raise_for_status()
        answer = httpx.get(f"{platform.address.airflow_url}/api/v2/monitor/health", timeout=5)
        parts = answer.raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        return False
    names = ("metadatabase", "scheduler", "dag_processor", "triggerer")
    return all(parts[name]["status"] == "healthy" for name in names)


@pytest.mark.parametrize("name", COMPONENTS)
def test_component(platform: Platform, rows: list[Row], name: str) -> None:
    def kill() -> Callable[[], bool]:
        victim = component(platform, name)
        assert victim is not None
        os.kill(victim.pid, signal.SIGKILL)

        def is_back() -> bool:
            now = component(platform, name)
            return now is not None and now != victim and healthy(platform)

        return is_back

    play(platform, rows, name, kill)


def test_supervisor(platform: Platform, rows: list[Row]) -> None:
    """Its parts go on without it; `up` puts all of them under a new one."""

    def supervisor() -> psutil.Process:
        return psutil.Process(json.loads(platform.paths.supervisor_file.read_text())["pid"])

    def kill() -> Callable[[], bool]:
        victim = supervisor()
        os.kill(victim.pid, signal.SIGKILL)
        # It holds its lock until the system has taken it apart; then whoever wants starts it again.
        victim.wait(timeout=60)
        up(platform.settings, note)
        return lambda: supervisor() != victim and healthy(platform)

    play(platform, rows, "supervisor", kill)


# --- servers --------------------------------------------------------------------------------------


def server(platform: Platform, release_id: str) -> ObservedServer | None:
    """Return the ready server of a release."""
    for found in observed_servers(ServingPaths.of(platform.settings)):
        if found.release_id == release_id and found.state == "ready" and found.alive:
            return found
    return None


@pytest.mark.parametrize("role", ["candidate", "stable"])
def test_server(platform: Platform, rows: list[Row], role: str) -> None:
    def kill() -> Callable[[], bool]:
        channel = platform.channel
        track = channel.candidate if role == "candidate" else channel.stable
        assert track is not None
        victim = server(platform, track.release_id)
        assert victim is not None
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)

        def is_back() -> bool:
            """A candidate that was given up need not come back, but its stable release serves."""
            stable = platform.stable
            wanted = track.release_id if role == "stable" else stable
            now = server(platform, wanted if platform.channel.in_progress else stable)
            return now is not None and now.pid != victim.pid

        return is_back

    play(platform, rows, f"{role}-server", kill)


# --- a step in another run ------------------------------------------------------------------------


def measuring(platform: Platform) -> psutil.Process | None:
    """Return the process of a running `trainyard measure`."""
    for process in platform.processes():
        with contextlib.suppress(psutil.Error):
            arguments = process.cmdline()
            if "measure" in arguments and "--die-with-parent" in arguments:
                return process
    return None


def start_measuring(platform: Platform, run_id: str) -> psutil.Process:
    """Ask for a release that must be measured anew, and return the step that does it."""
    # A number of slots that nobody has asked for yet makes other settings, never measured.
    slots = 2 + len(list_releases(platform.store, MODEL))
    assert platform.release(run_id, "r1", overrides={"max_num_seqs": slots})
    found = wait_for(lambda: measuring(platform), "a step that measures", timeout_s=120)
    assert isinstance(found, psutil.Process)
    return found


def worker_of(process: psutil.Process, scheduler: psutil.Process) -> psutil.Process:
    """Return the executor's worker (a child of the scheduler) that a step descends from."""
    for parent in process.parents():
        if parent.ppid() == scheduler.pid:
            return parent
    raise AssertionError(f"{process} does not descend from {scheduler}")


@pytest.mark.parametrize("name", ["worker", "step"])
def test_step_of_another_release(platform: Platform, rows: list[Row], name: str) -> None:
    """The rollout goes on, and the other release is measured all the same."""
    run_id = f"chaos-{name}-release-{int(time.time())}"

    def kill() -> Callable[[], bool]:
        step = start_measuring(platform, run_id)
        scheduler = component(platform, "scheduler")
        assert scheduler is not None
        victim = step if name == "step" else worker_of(step, scheduler)
        os.kill(victim.pid, signal.SIGKILL)

        def is_back() -> bool:
            now = measuring(platform)
            # It may have been killed before it wrote its first report.
            report = platform.statuses(run_id).get("measure")
            done = report is not None and report.state == "done"
            return done or (now is not None and now != step)

        return is_back

    play(platform, rows, name, kill)
    assert platform.ended(RELEASE, run_id, timeout_s=600) == "success", platform.describe(
        RELEASE, run_id
    )
    assert platform.statuses(run_id)["measure"].attempt > 1


# --- nothing can be scheduled ---------------------------------------------------------------------


@contextlib.contextmanager
def stopped_scheduling(platform: Platform) -> Iterator[None]:
    """Stop the scheduler and all its workers where they are: there is no slot for anything."""
    scheduler = component(platform, "scheduler")
    assert scheduler is not None
    frozen = [scheduler, *scheduler.children(recursive=True)]
    for process in frozen:
        process.suspend()
    try:
        yield
    finally:
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def last_arrival(platform: Platform, release_id: str, number: int) -> float:
    """Look on until a rollout has ended; return when its candidate got its last request.

    Seconds since 1970, late by at most the tenth of a second between two looks at the proxy.
    """
    arrivals, last, ended_at = -1, 0.0, 0.0
    began = time.time()
    while not ended_at or time.time() < ended_at + 3.0:
        now = time.time()
        assert now < began + ENDED_WITHIN_S, platform.channel.rollout
        route = platform.route
        traffic = route.traffic.get(release_id) if route is not None else None
        if traffic is not None and traffic.arrivals > arrivals:
            arrivals, last = traffic.arrivals, now
        if not ended_at and outcome(platform, number) is not None:
            ended_at = now
        time.sleep(0.1)
    return last


def test_a_slow_release_is_taken_back_while_nothing_can_be_scheduled(platform: Platform) -> None:
    """Judge and rollback need no worker, no slot of a pool and no scheduler."""
    run_id = f"chaos-slow-{int(time.time())}"
    assert platform.release(run_id, "r2", overrides={"max_num_seqs": 1})
    assert platform.ended(RELEASE, run_id) == "success", platform.describe(RELEASE, run_id)
    slow = platform.release_of(run_id)
    with Watch(platform) as watch:
        run_id, number = promote(platform, "no-worker", slow)
        wait_for(
            lambda: exposed(platform, number),
            "traffic of the candidate",
            timeout_s=EXPOSED_WITHIN_S,
        )
        with stopped_scheduling(platform):
            note("stopped: scheduler and workers")
            last = last_arrival(platform, slow, number)
            ended = outcome(platform, number)
            assert ended is not None
            assert ended.outcome == "rolled_back", ended.reason
            assert platform.api.run_state(PROMOTE, run_id) == "running"
    look = read_document(platform.store, ended.evidence_key, Look)
    delay_s = last - look.snapshot.at.timestamp()
    note(f"rolled back ({ended.reason}); the last request came {delay_s:.2f} s after the look")
    check_end(platform, watch, platform.channel, run_id, ended)
