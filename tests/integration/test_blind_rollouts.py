"""Whole rollouts whose figures go missing, in every way they can: hold, then act, never promote.

The state machine, driver and guard are the real ones, in the simulated world. In most tests the
judge is the worst one there could be: whatever it is shown, it says NON_INFERIOR. The blind rules'
times are a small part of the real ones, which `tests/unit/rollout/test_blindness.py` keeps. What
the readers make of a broken Prometheus is in `tests/unit/rollout/readers`, what they make of a real
one in `test_prometheus.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
from tests.integration.test_rollout_crashes import simple_judge
from tests.rollout_world import (
    ENVIRONMENT,
    MODEL,
    QUICK_ROLLOUT,
    START,
    World,
    check_that_it_serves_alone,
    release_id,
)
from tests.unit.rollout.machine import make_verdict

from trainyard.documents.channel import Channel
from trainyard.documents.evidence import Block, JudgeSpec, Verdict
from trainyard.documents.look import DeviceCounters, Histogram, Look, PodCounters
from trainyard.errors import Conflict, Transient
from trainyard.rollout.channel_store import change_channel
from trainyard.rollout.driver import DriveResult
from trainyard.rollout.history_log import HistoryLog
from trainyard.rollout.judge import judge
from trainyard.rollout.looks import LookLog
from trainyard.rollout.rollouts import Rollouts, Tick

pytestmark = pytest.mark.integration

A, B = release_id("a"), release_id("b")


Spoil = Callable[[PodCounters], PodCounters | None]
BLIND_CANDIDATE_S, BLIND_S = 15.0, 40.0


QUICK: dict[str, Any] = {
    "steps": [{"weight": 10, "hold_s": 10}, {"weight": 50, "hold_s": 20}],
    "bake_s": 10,
    "max_duration_s": 7200,
    "judge": {**QUICK_ROLLOUT["judge"], "block_s": 5},
}


def gullible(blocks: Sequence[Block], spec: JudgeSpec) -> Verdict:
    """Promote, whatever is shown."""
    return make_verdict("NON_INFERIOR")


@pytest.fixture(scope="module")
def started() -> World:
    """A world with the stable release `a` and a good release `b`."""
    made = World(rate=20.0)
    made.publish("a")
    assert made.run(made.promote(A, run_id="first")).outcome == "promoted"
    made.publish("b", **QUICK)
    made.said.clear()
    made.told.clear()
    return made


@pytest.fixture
def world(started: World) -> World:
    """A copy of it, with a judge that believes everything."""
    made = copy.deepcopy(started)
    made.judge = gullible
    return made


def promote(world: World, name: str = B) -> Tick:
    """Begin a promotion under quick blind rules."""
    tick = world.promote(name)

    def hurry(channel: Channel) -> Channel:
        assert channel.rollout is not None
        times = {"blind_candidate_s": BLIND_CANDIDATE_S, "blind_s": BLIND_S}
        plan = channel.rollout.plan.model_copy(update=times)
        return channel.model_copy(
            update={
                "rollout": channel.rollout.model_copy(update={"plan": plan}),
                "generation": channel.generation + 1,
            }
        )

    change_channel(world.store, MODEL, ENVIRONMENT, hurry)
    return tick


def of(release: str, change: Callable[[PodCounters], PodCounters | None]) -> Spoil:
    """Return a fault of one release."""
    return lambda pod: change(pod) if pod.release_id == release else pod


class Frozen:
    """Shows what it showed first."""

    def __init__(self) -> None:
        self._first: dict[str, PodCounters] = {}

    def __call__(self, pod: PodCounters) -> PodCounters:
        return self._first.setdefault(pod.pod, pod)


class Resetting:
    """Counts from zero at every look."""

    def __init__(self, *, told: bool) -> None:
        self._told = told
        self._last: dict[str, PodCounters] = {}
        self._starts = 0

    def __call__(self, pod: PodCounters) -> PodCounters:
        assert pod.ttft is not None
        assert pod.tpot is not None
        self._starts += 1
        few = max(0, 1000 - self._starts)
        return pod.model_copy(
            update={
                "ttft": Histogram(count=few, total=0.01 * few),
                "tpot": Histogram(count=few, total=0.004 * few),
                "process_started_s": float(self._starts) if self._told else None,
            }
        )


def without_latencies(pod: PodCounters) -> PodCounters:
    return pod.model_copy(update={"ttft": None, "tpot": None})


CANDIDATE_FAULTS: dict[str, Callable[[], Spoil]] = {
    "gone": lambda: of(B, lambda pod: None),
    "series missing": lambda: of(B, without_latencies),
    "frozen": lambda: of(B, Frozen()),
    "counters reset": lambda: of(B, Resetting(told=False)),
    "processes restart": lambda: of(B, Resetting(told=True)),
}

SOURCE_FAULTS: dict[str, Callable[[], Spoil]] = {
    "gone": lambda: lambda pod: None,
    "frozen": lambda: Frozen(),
    "counters reset": lambda: Resetting(told=False),
    "stable gone": lambda: of(A, lambda pod: None),
    "stable series missing": lambda: of(A, without_latencies),
}


def at_weight(percent: int) -> Callable[[Channel], bool]:
    return lambda channel: channel.weights.candidate == percent


def watch(world: World, tick: Tick, *, limit_s: float) -> tuple[DriveResult, float, int]:
    """Run to the end; return result, seconds, and the largest weight that the candidate had."""
    began, most = world.now, 0

    def note(channel: Channel) -> bool:
        nonlocal most
        rollout = channel.rollout
        assert rollout is not None
        assert rollout.phase != "baking" or rollout.ending is not None
        most = max(most, channel.weights.candidate)
        return rollout.ending is not None

    world.run(tick, until=note, limit_s=limit_s)
    seconds = (world.now - began).total_seconds()
    return world.run(tick), seconds, most


@pytest.mark.parametrize("fault", CANDIDATE_FAULTS)
def test_a_candidate_that_cannot_be_seen_is_withdrawn_first(world: World, fault: str) -> None:
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    world.spoil = CANDIDATE_FAULTS[fault]()
    result, seconds, most = watch(world, tick, limit_s=60)
    assert result.outcome == "withdrawn"
    # A frozen source shows only once the router has sent it enough.
    assert BLIND_CANDIDATE_S <= seconds <= BLIND_CANDIDATE_S + 25
    # By then it may have taken one step more.
    assert most <= (50 if fault == "frozen" else 10)
    assert "not seen for" in result.summary
    assert world.channel.rejected == ()
    world.advance(2)
    assert world.effective == {A: 100}


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_a_source_that_fails_holds_first_and_acts_later(world: World, fault: str) -> None:
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    world.spoil = SOURCE_FAULTS[fault]()
    result, seconds, most = watch(world, tick, limit_s=150)
    assert result.outcome == "withdrawn"
    assert BLIND_S <= seconds <= BLIND_S + 15
    assert most == 10
    assert "not both seen for" in result.summary
    assert world.channel.rejected == ()


def test_a_source_that_is_half_gone_counts_as_gone(world: World) -> None:
    world.environments[ENVIRONMENT] = world.environments[ENVIRONMENT].model_copy(
        update={"devices": 4}
    )
    c = world.publish("c", replicas=2, **QUICK)
    tick = promote(world, c)
    world.run(tick, until=at_weight(10))
    assert len(world.servers_of(c)) == 2
    world.spoil = lambda pod: None if pod.pod == f"{c}-1" else pod
    result, seconds, most = watch(world, tick, limit_s=60)
    assert (result.outcome, most) == ("withdrawn", 10)
    assert seconds <= BLIND_CANDIDATE_S + 15
    assert f"no counters of {c}-1" in result.summary


def test_a_source_that_comes_back_harms_nobody(world: World) -> None:
    world.judge = judge
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    world.spoil = lambda pod: None
    end = world.now + timedelta(seconds=30)
    world.run(tick, until=lambda _: world.now >= end)
    assert world.channel.weights.candidate == 10
    world.spoil = lambda pod: pod
    assert world.run(tick).outcome == "promoted"


def test_nobody_is_promoted_in_the_moment_of_proof_if_the_source_is_gone(world: World) -> None:
    """The evidence would do, but it is of the past."""
    tick = promote(world)
    world.run(tick, until=at_weight(50))
    end = world.now + timedelta(seconds=15)
    world.run(tick, until=lambda _: world.now >= end)
    world.spoil = lambda pod: None
    result, _, _ = watch(world, tick, limit_s=150)
    assert result.outcome == "withdrawn"


def test_a_bake_without_sight_goes_back_to_the_old_release(world: World) -> None:
    tick = promote(world)
    world.run(tick, until=lambda c: c.rollout is not None and c.rollout.phase == "baking")
    world.spoil = of(B, lambda pod: None)
    result = world.run(tick)
    assert result.outcome == "withdrawn"
    assert world.channel.stable is not None
    assert world.channel.stable.release_id == A


def test_a_mute_router_is_no_sight_either(world: World) -> None:
    tick = promote(world)
    world.run(tick, until=lambda c: c.rollout is not None and c.rollout.phase == "holding")
    world.router_mute = True
    result, seconds, _ = watch(world, tick, limit_s=150)
    assert result.outcome == "withdrawn"
    assert BLIND_S <= seconds <= BLIND_S + 15


@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
def test_a_clock_that_goes_back_holds_and_does_not_count_anything_twice(
    world: World, bad: bool
) -> None:
    world.judge = simple_judge(frozenset({B} if bad else ()))
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    until = world.now + timedelta(seconds=9)
    world.run(tick, until=lambda _: world.now >= until)
    before = looks(world)
    world.now -= timedelta(seconds=12)
    world.run(tick, until=lambda _: world.now >= until - timedelta(seconds=1))
    assert looks(world) == before
    result = world.run(tick)
    assert result.outcome == ("rolled_back" if bad else "promoted")
    times = [look.snapshot.at for look in stored_looks(world)]
    assert times == sorted(set(times))
    check_that_it_serves_alone(world, *((A, B) if bad else (B, A)))


def test_a_clock_that_goes_far_back_is_blindness(world: World) -> None:
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    until = world.now + timedelta(seconds=6)
    world.run(tick, until=lambda _: world.now >= until)
    assert world.channel.weights.candidate == 10
    world.now -= timedelta(hours=2)
    world.lease_until = None
    result, seconds, most = watch(world, tick, limit_s=300)
    assert (result.outcome, most) == ("withdrawn", 10)
    assert seconds <= BLIND_S + 15
    assert "clock" in result.summary or "controller" in result.summary
    assert world.channel.rejected == ()
    check_that_it_serves_alone(world, A, B)


@pytest.mark.parametrize("slept", [False, True], ids=["clock set", "machine slept"])
def test_a_clock_that_goes_far_forward_promotes_nobody(world: World, slept: bool) -> None:
    """Every time limit has passed at once; the evidence has not grown.

    The judge is one that needs the last step: a hold goes on where there is proof only.
    """
    world.judge = simple_judge()
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    world.advance(1)
    tick()
    world.now += timedelta(hours=12)
    if slept:
        # The guard is awake before the driver, and the lease is over.
        world.advance(0.5)
        assert world.effective == {A: 100, B: 0}
    # Besides, `watch` demands that it never gets to the bake.
    result, _, most = watch(world, tick, limit_s=QUICK_ROLLOUT["max_hold_s"] + 60)
    assert (result.outcome, most) == ("withdrawn", 0 if slept else 10)
    assert ("controller was lost" if slept else "could not decide") in result.summary
    assert world.channel.rejected == ()
    check_that_it_serves_alone(world, A, B)


@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
def test_after_a_clock_that_went_forward_only_evidence_decides(world: World, bad: bool) -> None:
    """An hour of two has passed at once, with the requests of a moment."""
    world.judge = simple_judge(frozenset({B} if bad else ()))
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    world.advance(1)
    tick()
    exposed = len(stored_looks(world))
    world.now += timedelta(hours=1)
    result = world.run(tick)
    assert result.outcome == ("rolled_back" if bad else "promoted")
    assert len(stored_looks(world)) > exposed + 2
    check_that_it_serves_alone(world, *((A, B) if bad else (B, A)))


@dataclass
class Sick:
    """A part of the world that fails at every n-th call, with a conflict or as if it were down."""

    part: object
    every: int
    error: type[Exception]
    calls: int = 0

    def __getattr__(self, name: str) -> object:
        found = getattr(self.part, name)
        if not callable(found):
            return found

        def call(*args: object, **kwargs: object) -> object:
            self.calls += 1
            if self.calls % self.every == 0:
                raise self.error(f"{name} failed")
            return found(*args, **kwargs)

        return call


@pytest.mark.parametrize(
    ("part", "error"),
    [("store", Transient), ("host", Conflict), ("lease", Transient), ("warmer", Conflict)],
    ids=["store 5xx", "host 409", "lease 5xx", "warmer 409"],
)
def test_dependencies_that_fail_now_and_then_decide_nothing(
    world: World, part: str, error: type[Exception]
) -> None:
    promote(world)
    deps = world.deps()
    tick = Rollouts(
        replace(deps, **{part: Sick(getattr(deps, part), 23 if part == "store" else 7, error)})
    ).begin(kind="promote", model=MODEL, environment=ENVIRONMENT, release_id=B, run_id="run")
    result = None
    for _ in range(1000):
        try:
            result = tick()
        except (Transient, Conflict):
            result = None
        if result is not None and result.done:
            break
        world.advance(0.5)
    assert result is not None
    assert result.outcome in {"promoted", "withdrawn"}
    assert world.channel.rejected == ()
    assert world.unguarded_arrivals == 0


# --- what else the readers feed -------------------------------------------------------------------


def device(release: str, **errors: int) -> DeviceCounters:
    return DeviceCounters(
        place="node-1",
        release_id=release,
        errors={name.replace("__", "/"): n for name, n in errors.items()},
    )


def with_nodes(world: World) -> None:
    world.spoil = lambda pod: pod.model_copy(
        update={"node": "node-1" if pod.release_id == B else "node-2"}
    )


def test_failed_executions_on_the_candidates_devices_blow_the_fuse(world: World) -> None:
    with_nodes(world)
    world.devices = (device(B, execution__numerical=0),)
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    world.devices = (device(B, execution__numerical=3),)
    result, seconds, _ = watch(world, tick, limit_s=60)
    assert result.outcome == "rolled_back"
    assert seconds <= 15
    assert "3 numerical" in world.channel.rejected[0].reason


def test_a_broken_device_under_the_candidate_withdraws_it(world: World) -> None:
    with_nodes(world)
    world.devices = (device("", ecc__mem_ecc_uncorrected=0),)
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    world.devices = (device("", ecc__mem_ecc_uncorrected=1),)
    result, _, _ = watch(world, tick, limit_s=60)
    assert result.outcome == "withdrawn"
    assert world.channel.rejected == ()


def test_devices_that_nobody_counts_any_more_are_no_reason(world: World) -> None:
    with_nodes(world)
    world.devices = (device(B, execution__numerical=2),)
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    world.devices = ()
    assert world.run(tick).outcome == "promoted"


def remembering(world: World, minutes: int) -> World:
    """Let the world's source remember two servers of `a`, a minute apart."""
    world.memory = tuple(
        (
            world.now - timedelta(minutes=minutes - n),
            tuple(
                PodCounters(
                    pod=f"{A}-{number}",
                    release_id=A,
                    started_at=START,
                    ttft=Histogram(count=600 * n, total=600 * n * 0.03),
                    tpot=Histogram(count=600 * n, total=600 * n * 0.004),
                )
                for number in range(2)
            ),
        )
        for n in range(minutes)
    )
    return world


def test_what_the_source_remembers_reaches_the_judge(world: World) -> None:
    remembering(world, 90)
    seen: list[tuple[float, int]] = []

    def note(blocks: Sequence[Block], spec: JudgeSpec) -> Verdict:
        history = [block for block in blocks if block.t <= 0 and block.weight_candidate == 0]
        pods = {block.pod for block in history if block.metric == "ttft"}
        seen.append((min((block.t for block in history), default=0.0), len(pods)))
        return gullible(blocks, spec)

    world.judge = note
    world.run(promote(world), until=at_weight(50))
    assert seen[-1][0] < -3600
    assert seen[-1][1] == 2


def test_history_is_kept_with_the_rollout_and_outlives_its_source(world: World) -> None:
    remembering(world, 60)
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    number = world.channel.rollout.number  # type: ignore[union-attr]
    kept = HistoryLog(world.store).read(MODEL, ENVIRONMENT, number)
    assert kept is not None
    assert (kept.source, len(kept.snapshots)) == ("metrics", 60)
    world.memory = None
    assert world.run(tick).outcome == "promoted"
    assert HistoryLog(world.store).read(MODEL, ENVIRONMENT, number) == kept


def stored_looks(world: World) -> list[Look]:
    assert world.channel.rollout is not None
    return LookLog(world.store).read(MODEL, ENVIRONMENT, world.channel.rollout.number)


def looks(world: World) -> list[str]:
    return sorted(key for key in world.store.keys if "/looks/" in key)
