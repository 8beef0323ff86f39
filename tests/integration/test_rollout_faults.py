"""Whole rollouts, each with one part of the world that fails: every part, in every way.

A part fails with a conflict (409), as if it were down (5xx), after a time-out, or in a way that
nobody foresaw; at one call in four, or at all of them for a minute and a half. State machine,
driver and guard are the real ones, in the simulated world; the judge is the worst one there could
be: whatever it is shown, it says NON_INFERIOR. Whoever drives does as the trigger does: what may
pass is tried again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from random import Random
from typing import Any

import pytest
from tests.integration.test_blind_rollouts import (
    BLIND_CANDIDATE_S,
    BLIND_S,
    QUICK,
    at_weight,
    gullible,
)
from tests.rollout_world import (
    ENVIRONMENT,
    MODEL,
    World,
    check_that_it_serves_alone,
    release_id,
)
from tests.unit.rollout.machine import make_verdict

from trainyard.documents.channel import Channel
from trainyard.errors import Conflict, TrainyardError, Transient
from trainyard.rollout.channel_store import change_channel
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.driver import DriveResult
from trainyard.rollout.rollouts import Rollouts, Tick

pytestmark = pytest.mark.integration

A, B = release_id("a"), release_id("b")
LEASE_S = 20.0
FAULT_S = 90.0
TIMEOUT_S = 1.0
PAUSE_S = 1.0
"""Seconds between two ticks at least: fewer ticks, so that the whole table is done soon."""
SEED = 5


@dataclass(frozen=True)
class Part:
    """A part of the world, and what a rollout does without it."""

    of: str
    """Its name in `RolloutDeps`."""
    calls: frozenset[str] = frozenset()
    """Which of its functions fail. Empty: it is a function itself."""
    keys: str = ""
    """Of the store: a part of the keys at which it fails."""
    from_start: bool = False
    """Does it fail from the beginning on? Else from the first traffic."""
    needed: str = ""
    """What ends a rollout without it: `blind` (after `BLIND_S`) or `lease` (after `LEASE_S`).
    Empty: nothing, it can do without."""


STORE = frozenset({"read", "exists", "create", "replace", "put", "delete", "list"})
HOST = frozenset({"deploy", "scale", "remove", "servers", "hold_autoscaling", "resume_autoscaling"})
PROBER = frozenset({"read", "keep", "stop", "slowest_s"})

PARTS = {
    "channel": Part("store", STORE, keys="channels/", needed="lease"),
    "looks": Part("store", STORE, keys="/looks", needed="lease"),
    "history log": Part("store", STORE, keys="/history.json", from_start=True),
    "outbox": Part("store", STORE, keys="/events/"),
    "attestations": Part("store", STORE, keys="attestations/"),
    "host": Part("host", HOST, needed="blind"),
    "servers": Part("host", frozenset({"servers"}), needed="blind"),
    "router": Part("router", frozenset({"status"}), needed="blind"),
    "counters": Part("metrics", frozenset({"read"}), needed="blind"),
    "device errors": Part("metrics", frozenset({"devices"})),
    "counters' past": Part("metrics", frozenset({"history"}), from_start=True),
    "judge": Part("judge", needed="blind"),
    "prober": Part("prober", PROBER, from_start=True),
    "lease": Part("lease", frozenset({"look", "renew", "release"}), needed="lease"),
    "guard's record": Part("guard_events"),
    "warmer": Part("warmer", frozenset({"warm_up"}), from_start=True),
    "notices": Part("tell"),
}

TELLERS = {
    name: PARTS[name]
    for name in (
        "servers", "router", "counters", "device errors", "counters' past", "judge", "prober",
        "guard's record",
    )
}  # fmt: skip
"""Parts that only tell something."""

Fail = Callable[[World, str], Exception]


def conflict(world: World, what: str) -> Exception:
    return Conflict(f"{what}: status 409")


def down(world: World, what: str) -> Exception:
    return Transient(f"{what}: status 503")


def timeout(world: World, what: str) -> Exception:
    """Answer after a while that there is no answer; stores say so in their own words."""
    world.advance(TIMEOUT_S)
    late = f"{what} timed out"
    return Transient(late) if what.startswith("store") else TimeoutError(late)


def unforeseen(world: World, what: str) -> Exception:
    return KeyError("le")


ERRORS: dict[str, Fail] = {"409": conflict, "5xx": down, "timeout": timeout}


@dataclass
class Fault:
    """Which calls of a part fail, and how."""

    world: World
    part: Part
    fail: Fail
    share: float = 1.0
    """Of the calls, by a die with a fixed seed; 1: all fail."""
    since: datetime | None = None
    until: datetime | None = None
    failed: int = 0
    die: Random = field(default_factory=lambda: Random(SEED))

    def begin(self) -> None:
        self.since = self.world.now
        self.until = self.since + timedelta(seconds=FAULT_S)

    @property
    def active(self) -> bool:
        now = self.world.now
        return self.since is not None and self.until is not None and self.since <= now < self.until

    def hits(self, name: str, args: tuple[Any, ...]) -> bool:
        """Tell whether a call fails, and count it."""
        if not self.active or (self.part.calls and name not in self.part.calls):
            return False
        if self.part.keys and self.part.keys not in f"{args[0]}":
            return False
        if self.die.random() >= self.share:
            return False
        self.failed += 1
        return True

    def in_deps(self, deps: RolloutDeps) -> RolloutDeps:
        """Return the dependencies with the part that fails."""
        return replace(deps, **{self.part.of: Faulty(getattr(deps, self.part.of), self)})


@dataclass
class Faulty:
    """The part, as its users see it."""

    part: Any
    fault: Fault

    def _call(self, name: str, function: Any, args: tuple[Any, ...], named: Any) -> Any:
        if self.fault.hits(name, args):
            raise self.fault.fail(self.fault.world, f"{self.fault.part.of} {name}".strip())
        return function(*args, **named)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._call("", self.part, args, named)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.part, name)
        if not callable(found):
            return found
        return lambda *args, **named: self._call(name, found, args, named)


@dataclass
class Seen:
    """What a rollout did on its way."""

    result: DriveResult
    most_while_failing: int = 0
    """Largest weight of the candidate while the part failed."""
    decided_s: float | None = None
    """Seconds from the beginning of the fault until it was certain how the rollout ends."""
    proven_while_failing: bool = False
    lines: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def started() -> World:
    """A world with the stable release `a` and another one, `b`."""
    made = World(rate=20.0)
    rules = made.environments[ENVIRONMENT].model_copy(update={"lease_s": LEASE_S})
    made.environments[ENVIRONMENT] = rules
    made.publish("a")
    assert made.run(made.promote(A, run_id="first")).outcome == "promoted"
    made.publish("b", **QUICK)
    made.judge = gullible
    return made


@pytest.fixture
def world(started: World) -> World:
    return copy.deepcopy(started)


def hurry(world: World) -> None:
    """Let the blind rules of the rollout under way act soon."""

    def change(channel: Channel) -> Channel:
        assert channel.rollout is not None
        times = {"blind_candidate_s": BLIND_CANDIDATE_S, "blind_s": BLIND_S}
        plan = channel.rollout.plan.model_copy(update=times)
        rollout = channel.rollout.model_copy(update={"plan": plan})
        return channel.model_copy(update={"rollout": rollout, "generation": channel.generation + 1})

    change_channel(world.store, MODEL, ENVIRONMENT, change)


def roll_out(world: World, fault: Fault) -> Seen:
    """Promote `b` with a fault, drive as the trigger does, and look at every channel on the way."""
    world.promote(B)
    hurry(world)
    tick: Tick = Rollouts(fault.in_deps(world.deps())).begin(
        kind="promote", model=MODEL, environment=ENVIRONMENT, release_id=B, run_id="run"
    )
    if fault.part.from_start:
        fault.begin()
    seen: Seen | None = None
    lines: list[str] = []
    most, decided_s, proven = 0, None, False
    for _ in range(4000):
        if fault.since is None and at_weight(10)(world.channel):
            fault.begin()
        try:
            result = tick()
            pause_s = max(result.next_in_s, PAUSE_S)
            lines.extend(result.messages)
        except TrainyardError as error:
            if not error.retryable:
                raise
            result, pause_s = None, 2.0
        channel = world.channel
        rollout = channel.rollout
        assert rollout is not None
        assert channel.weights.stable + channel.weights.candidate == 100
        if fault.active:
            most = max(most, channel.weights.candidate)
            proven = proven or rollout.phase == "baking" or rollout.ending == "promoted"
        if decided_s is None and rollout.ending is not None and fault.since is not None:
            decided_s = (world.now - fault.since).total_seconds()
        if result is not None and result.done:
            seen = Seen(result, most, decided_s, proven, lines)
            break
        world.advance(pause_s)
    assert seen is not None, world.channel.rollout
    return seen


def check_the_end(world: World, outcome: str | None) -> None:
    """Check that one release serves, is the one that should, and nothing is left of the other."""
    winner, loser = (B, A) if outcome == "promoted" else (A, B)
    check_that_it_serves_alone(world, winner, loser)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_fails_for_long_promotes_nobody_who_needs_it(
    world: World, name: str, error: str
) -> None:
    part = PARTS[name]
    fault = Fault(world, part, ERRORS[error])
    seen = roll_out(world, fault)
    assert fault.failed, "the part was needed at least once"
    if part.needed:
        assert seen.result.outcome == "withdrawn"
        assert not seen.proven_while_failing
        # Without a lease everything can be seen, so steps go on until it ends.
        assert seen.most_while_failing <= (50 if name == "lease" else 10)
        assert seen.decided_s is not None
    else:
        assert seen.result.outcome == "promoted"
    if part.needed == "blind":
        assert seen.decided_s is not None
        assert BLIND_S <= seen.decided_s <= BLIND_S + 30
    assert world.channel.rejected == ()
    check_the_end(world, seen.result.outcome)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_fails_now_and_then_only_costs_time(world: World, name: str) -> None:
    ways = [*ERRORS.values(), *([unforeseen] if name in TELLERS else [])]
    die = Random(SEED)
    fault = Fault(world, PARTS[name], lambda *where: die.choice(ways)(*where), share=0.25)
    seen = roll_out(world, fault)
    assert seen.result.outcome == "promoted"
    assert world.channel.rejected == ()
    check_the_end(world, seen.result.outcome)


@pytest.mark.parametrize("name", PARTS)
def test_a_bad_release_goes_whatever_else_fails(world: World, name: str) -> None:
    """HARM is said when the part has failed for a while, and again once it has come back."""
    fault = Fault(world, PARTS[name], down)
    world.judge = lambda blocks, spec: make_verdict("HARM" if fault.since else "UNDECIDED")
    seen = roll_out(world, fault)
    assert seen.result.outcome in {"rolled_back", "withdrawn"}
    assert not seen.proven_while_failing
    check_the_end(world, seen.result.outcome)


# --- what nobody foresaw --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TELLERS)
def test_an_error_that_nobody_foresaw_is_a_source_that_is_away(world: World, name: str) -> None:
    part = TELLERS[name]
    seen = roll_out(world, Fault(world, part, unforeseen))
    if part.needed:
        assert seen.result.outcome == "withdrawn"
        assert not seen.proven_while_failing
        assert seen.decided_s is not None
        assert BLIND_S <= seen.decided_s <= BLIND_S + 30
    else:
        assert seen.result.outcome == "promoted"
    told = [line for line in seen.lines if "KeyError: 'le'" in line and "It goes on" in line]
    assert len(told) == 1
    if name in ("counters", "judge"):
        assert "failed with KeyError: 'le'" in seen.result.summary
    check_the_end(world, seen.result.outcome)


@pytest.mark.parametrize("name", TELLERS)
def test_what_stops_a_process_stops_the_driver(world: World, name: str) -> None:
    def stop(world: World, what: str) -> Exception:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll_out(world, Fault(world, TELLERS[name], stop))
