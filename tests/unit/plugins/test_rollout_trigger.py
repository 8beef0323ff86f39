"""The trigger of a rollout: it goes on until there is an outcome, whatever passes by."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.serving_world import NOW, make_channel
from tests.unit.yard import Yard

from trainyard.errors import (
    Busy,
    Closed,
    Conflict,
    Refused,
    StaleDriver,
    TrainyardError,
    Transient,
)
from trainyard.rollout.driver import DriveResult

KWARGS: dict[str, Any] = {
    "environment": "production",
    "kind": "promote",
    "request": json.dumps(
        {"model": "adder", "release": "adder-0123456789ab", "force": False, "reason": None}
    ),
    "requested_by": "ada",
    "run_id": "neuron_promote__production/promote-1",
    "known_keys": [],
}


def tick(
    *messages: str, outcome: Any = None, summary: str = "On its way.", next_in_s: float = 0.0
) -> DriveResult:
    return DriveResult(
        outcome is not None, make_channel(), outcome, summary, tuple(messages), next_in_s
    )


class FakeRollouts:
    """Rollouts whose ticks are given; an error among them is raised."""

    def __init__(self, *ticks: DriveResult | Exception, begin: TrainyardError | None = None):
        self.ticks = list(ticks)
        self.begin_error = begin
        self.begun: list[dict[str, Any]] = []

    def begin(self, **request: Any) -> Callable[[], DriveResult]:
        self.begun.append(request)
        if self.begin_error is not None:
            raise self.begin_error
        return self.drive

    def drive(self) -> DriveResult:
        result = self.ticks.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def play(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Return what runs a trigger against fake rollouts and returns the events it fires."""
    from trainyard_airflow import rollout_trigger

    monkeypatch.setattr(rollout_trigger, "RETRY_AFTER_S", 0.0)

    def play_it(rollouts: FakeRollouts, **changes: Any) -> list[Any]:
        monkeypatch.setattr("trainyard.wiring.open_rollout", lambda settings, **_: rollouts)
        trigger = rollout_trigger.RolloutTrigger(**{**KWARGS, **changes})

        async def collect() -> list[Any]:
            return [event.payload async for event in trigger.run()]

        return asyncio.run(collect())

    return play_it


def test_another_triggerer_gets_all_of_it() -> None:
    from trainyard_airflow.rollout_trigger import RolloutTrigger

    path, kwargs = RolloutTrigger(**KWARGS).serialize()
    assert path == f"{RolloutTrigger.__module__}.{RolloutTrigger.__qualname__}"
    assert kwargs == KWARGS
    assert RolloutTrigger(**kwargs).serialize() == (path, kwargs)


def test_its_state_can_be_stored_by_airflow() -> None:
    from airflow.serialization.serialized_objects import BaseSerialization

    from trainyard_airflow.rollout_trigger import RolloutTrigger

    kwargs = RolloutTrigger(**KWARGS).serialize()[1]
    assert BaseSerialization.deserialize(BaseSerialization.serialize(kwargs)) == kwargs


@pytest.mark.parametrize("outcome", ["promoted", "rolled_back", "withdrawn"])
def test_it_ticks_until_there_is_an_outcome(play: Callable[..., list[Any]], outcome: str) -> None:
    rollouts = FakeRollouts(tick("one"), tick("two"), tick("end", outcome=outcome, summary="So."))
    assert play(rollouts) == [{"outcome": outcome, "message": "So."}]
    assert rollouts.ticks == []


def test_it_begins_with_what_the_run_asks_for(play: Callable[..., list[Any]]) -> None:
    rollouts = FakeRollouts(tick(outcome="promoted"))
    play(rollouts)
    assert rollouts.begun == [
        {
            "kind": "promote",
            "model": "adder",
            "environment": "production",
            "release_id": "adder-0123456789ab",
            "force": False,
            "reason": "",
            "requested_by": "ada",
            "run_id": "neuron_promote__production/promote-1",
        }
    ]


def test_a_rollback_needs_neither_release_nor_force(play: Callable[..., list[Any]]) -> None:
    rollouts = FakeRollouts(tick(outcome="promoted"))
    request = json.dumps({"model": "adder", "release": None, "reason": "It is slow."})
    play(rollouts, kind="rollback", request=request)
    begun = rollouts.begun[0]
    assert (begun["kind"], begun["release_id"], begun["force"]) == ("rollback", None, False)
    assert begun["reason"] == "It is slow."


@pytest.mark.parametrize("error", [Transient("The store is away."), Conflict("Somebody wrote.")])
def test_what_may_pass_is_tried_again(
    play: Callable[..., list[Any]], error: TrainyardError
) -> None:
    rollouts = FakeRollouts(error, error, tick(), error, tick(outcome="promoted", summary="So."))
    assert play(rollouts) == [{"outcome": "promoted", "message": "So."}]
    assert len(rollouts.begun) == 1


@pytest.mark.parametrize(
    "error", [Refused("No.", hint="Do not."), StaleDriver("Another one drives it.")]
)
def test_what_cannot_pass_ends_it(play: Callable[..., list[Any]], error: TrainyardError) -> None:
    assert play(FakeRollouts(tick(), error)) == [{"outcome": "refused", "message": str(error)}]


@pytest.mark.parametrize(
    "error", [Refused("It was rejected.", hint="Force it."), Busy("Another rollout.", hint="Wait.")]
)
def test_a_rollout_that_may_not_begin_is_refused(
    play: Callable[..., list[Any]], error: TrainyardError
) -> None:
    assert play(FakeRollouts(begin=error)) == [{"outcome": "refused", "message": str(error)}]


@pytest.mark.parametrize("kind", ["promote", "rollback"])
@pytest.mark.parametrize("error", [Transient("The store is away."), Conflict("Somebody wrote.")])
def test_a_rollout_that_cannot_begin_for_a_moment_is_tried_again(
    play: Callable[..., list[Any]], error: TrainyardError, kind: str
) -> None:
    from structlog.testing import capture_logs

    rollouts = FakeRollouts(tick(outcome="promoted", summary="So."))
    begin = rollouts.begin

    def away_twice(**request: Any) -> Callable[[], DriveResult]:
        drive = begin(**request)
        if len(rollouts.begun) <= 2:
            raise error
        return drive

    rollouts.begin = away_twice  # type: ignore[method-assign]
    with capture_logs() as log:
        assert play(rollouts, kind=kind) == [{"outcome": "promoted", "message": "So."}]
    assert len(rollouts.begun) == 3
    (line, _) = [entry for entry in log if entry["log_level"] == "warning"]
    assert f"cannot begin yet: {error}" in line["event"]


def test_a_store_that_stays_away_is_told_in_the_end(
    play: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainyard_airflow import rollout_trigger

    monkeypatch.setattr(rollout_trigger, "BEGIN_WITHIN_S", 0.05)
    rollouts = FakeRollouts(begin=Transient("The store is away."))
    (event,) = play(rollouts)
    assert event["outcome"] == "refused"
    assert "It could not begin, which was tried for" in event["message"]
    assert "The store is away." in event["message"]
    assert len(rollouts.begun) > 1


def test_a_defect_is_not_hidden(play: Callable[..., list[Any]]) -> None:
    with pytest.raises(ZeroDivisionError):
        play(FakeRollouts(ZeroDivisionError()))


def test_each_event_is_logged_once(
    play: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from structlog.testing import capture_logs

    ticks: Sequence[DriveResult] = [
        tick("deploying"),
        tick("deploying"),
        tick("deploying"),
        tick("shifting", "weights 10"),
        tick("promoted", outcome="promoted"),
    ]
    with capture_logs() as log:
        play(FakeRollouts(*ticks))
    lines = [entry["event"] for entry in log if entry["log_level"] == "info"]
    assert lines == ["deploying", "shifting", "weights 10", "promoted"]


def test_a_misspelt_key_of_a_rollback_moves_no_traffic(play: Callable[..., list[Any]]) -> None:
    """`relase` would otherwise go back to another release than the one that was meant."""
    rollouts = FakeRollouts()
    request = json.dumps({"model": "adder", "release": None, "relase": "adder-0123456789ab"})
    (event,) = play(rollouts, kind="rollback", request=request, known_keys=["model", "release"])
    assert event["outcome"] == "refused"
    assert "unknown keys: relase" in event["message"]
    assert rollouts.begun == []


def test_a_window_that_began_since_is_a_refusal(play: Callable[..., list[Any]]) -> None:
    rollouts = FakeRollouts(begin=Closed("It is frozen.", until=NOW))
    (event,) = play(rollouts)
    assert event == {"outcome": "refused", "message": "It is frozen."}


def test_a_window_that_began_since_is_waited_for_if_that_is_wished(
    play: Callable[..., list[Any]],
) -> None:
    rollouts = FakeRollouts(tick(outcome="promoted", summary="Stable."))
    begin = rollouts.begin

    def closed_once(**request: Any) -> Callable[[], DriveResult]:
        drive = begin(**request)
        if len(rollouts.begun) == 1:
            raise Closed("It is frozen.", until=NOW)
        return drive

    rollouts.begin = closed_once  # type: ignore[method-assign]
    request = json.dumps({"model": "adder", "release": "adder-1", "wait_for_window": True})
    (event,) = play(rollouts, request=request)
    assert event == {"outcome": "promoted", "message": "Stable."}
    assert len(rollouts.begun) == 2


def test_a_window_that_began_while_it_waited_for_its_turn(play: Callable[..., list[Any]]) -> None:
    closed = Closed("It is frozen.", until=NOW)
    wanted = tick(outcome="promoted", summary="Stable.")
    rollouts = FakeRollouts(tick("It waits for the channel."), closed, wanted)
    request = json.dumps({"model": "adder", "release": "adder-1", "wait_for_window": True})
    assert play(rollouts, request=request) == [{"outcome": "promoted", "message": "Stable."}]
    assert len(rollouts.begun) == 1
    assert play(FakeRollouts(tick("It waits."), closed, wanted)) == [
        {"outcome": "refused", "message": "It is frozen."}
    ]


def test_events_of_the_rollout_are_told_with_the_run(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import UTC, datetime

    from trainyard.documents.channel import HistoryEntry
    from trainyard.rollout.outbox import RolloutEvent
    from trainyard_airflow.rollout_trigger import RolloutTrigger

    entry = HistoryEntry(at=datetime.now(UTC), event="held", release_id="adder-0123456789ab")
    event = RolloutEvent(
        model="adder", environment="production", rollout=1, entry=entry, message=""
    )
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "trainyard_airflow.notify.tell", lambda notice, _: told.append((notice.kind, notice.run))
    )

    def open_rollout(settings: Any, *, notify: Callable[[RolloutEvent], None]) -> FakeRollouts:
        notify(event)
        return FakeRollouts(tick(outcome="promoted"))

    monkeypatch.setattr("trainyard.wiring.open_rollout", open_rollout)

    async def run() -> None:
        async for _ in RolloutTrigger(**KWARGS).run():
            pass

    asyncio.run(run())
    assert told == [("held", KWARGS["run_id"])]


def test_rollouts_that_wait_for_something_slow_do_not_hold_up_another(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A triggerer's shared pool has a few threads; each rollout has its own."""
    from trainyard_airflow import rollout_trigger

    slow, ended = threading.Event(), tick(outcome="promoted", summary="It is promoted.")

    class Rollouts:
        def begin(self, *, run_id: str, **_: Any) -> Callable[[], DriveResult]:
            def drive() -> DriveResult:
                assert run_id == "quick" or slow.wait(60)
                return ended

            return drive

    monkeypatch.setattr("trainyard.wiring.open_rollout", lambda settings, **_: Rollouts())

    async def outcome(run_id: str) -> Any:
        trigger = rollout_trigger.RolloutTrigger(**{**KWARGS, "run_id": run_id})
        return [event.payload["outcome"] async for event in trigger.run()]

    async def all_of_them() -> Any:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        others = [asyncio.create_task(outcome(f"slow-{number}")) for number in range(4)]
        await asyncio.sleep(0.2)
        try:
            async with asyncio.timeout(30):
                quick = await outcome("quick")
        finally:
            slow.set()
        return [quick, *await asyncio.gather(*others)]

    assert asyncio.run(all_of_them()) == [["promoted"]] * 5
