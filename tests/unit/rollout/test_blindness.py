"""Blind rules of the state machine: hold first, act after a time, never promote."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from tests.unit.rollout.machine import (
    NEW,
    NOW,
    OLD,
    make_plan,
    make_verdict,
    requested,
    route,
    servers,
    used_channel,
)

from trainyard.documents.channel import Channel
from trainyard.rollout.events import FuseBlown, Looked, Notify, Sighted, TimePassed, WarmedUp
from trainyard.rollout.state_machine import commands_for, step

SEEN = Sighted("", "")
NO_CANDIDATE = Sighted("no counters of new-0", "")
NO_STABLE = Sighted("", "no counters of old-0")
NOBODY = Sighted("the router could not be asked", "the router could not be asked")


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def after(channel: Channel, seconds: float, *events: Any) -> Channel:
    for event in events:
        channel, _ = step(channel, event, at(seconds))
    return channel


def holding(**plan: Any) -> Channel:
    """Return a channel that holds at the first step, with requests seen, at 10 s."""
    channel = requested(used_channel(), make_plan(**plan))
    ready = servers(old="ready", new="ready")
    warm = WarmedUp(f"{NEW}-0@{NOW.isoformat()}", 3, 3)
    channel = after(channel, 5, ready, warm, ready)
    weights = {"old": 90, "new": 10}
    channel = after(channel, 6, route(weights, {"old": 0, "new": 0}))
    return after(channel, 10, route(weights, {"old": 180, "new": 20}))


def phase(channel: Channel) -> str:
    assert channel.rollout is not None
    return channel.rollout.phase


def blind_for(channel: Channel, since: float, until: float, event: Sighted, *more: Any) -> Channel:
    """Let looks be blind every half minute."""
    second = since
    while second <= until:
        channel = after(channel, second, servers(old="ready", new="ready"), event, *more)
        channel = after(channel, second, TimePassed())
        second += 30
    return channel


def test_the_channel_holds_at_the_first_step() -> None:
    assert phase(holding()) == "holding"


@pytest.mark.parametrize("event", [NO_CANDIDATE, NO_STABLE, NOBODY])
def test_a_blind_look_freezes_the_weight(event: Sighted) -> None:
    verdict = Looked(make_verdict("UNDECIDED"), "look")
    channel = after(holding(), 100, event, verdict)
    assert (phase(channel), channel.weights.candidate) == ("holding", 10)
    channel = after(channel, 130, SEEN, verdict)
    assert (phase(channel), channel.weights.candidate) == ("shifting", 50)


@pytest.mark.parametrize("event", [NO_CANDIDATE, NO_STABLE, NOBODY])
def test_nobody_is_promoted_blind(event: Sighted) -> None:
    one_step = make_plan().steps[1:]
    channel = holding(steps=one_step)
    # The single step has 50 %, so arrivals are still awaited.
    channel = after(channel, 12, route({"old": 50, "new": 50}, {"old": 180, "new": 20}))
    channel = after(channel, 20, route({"old": 50, "new": 50}, {"old": 280, "new": 120}))
    assert phase(channel) == "holding"
    proof = Looked(make_verdict("NON_INFERIOR"), "look")
    channel = after(channel, 100, event, proof)
    assert phase(channel) == "holding"
    assert phase(after(channel, 130, SEEN, proof)) == "baking"


def test_a_blind_candidate_is_withdrawn_after_three_minutes() -> None:
    channel = blind_for(holding(), 100, 270, NO_CANDIDATE)
    assert phase(channel) == "holding"
    channel = blind_for(channel, 280, 280, NO_CANDIDATE)
    assert phase(channel) == "rolling_back"
    assert channel.rollout is not None
    assert channel.rollout.ending == "withdrawn"
    assert channel.weights.candidate == 0
    assert channel.rejected == ()
    assert "not seen for 180 s: no counters of new-0" in channel.rollout.reason


@pytest.mark.parametrize("event", [NOBODY, NO_STABLE])
def test_otherwise_it_takes_ten_minutes(event: Sighted) -> None:
    plan = {"max_duration_s": 5000.0}
    channel = blind_for(holding(**plan), 100, 690, event)
    assert phase(channel) == "holding"
    channel = blind_for(channel, 700, 700, event)
    assert phase(channel) == "rolling_back"
    assert channel.rollout is not None
    assert (channel.rollout.ending, channel.weights.candidate) == ("withdrawn", 0)
    assert "not both seen for 600 s" in channel.rollout.reason


def test_changing_blindness_ends_all_the_same() -> None:
    channel = holding(max_duration_s=5000.0)
    for second in range(100, 700, 60):
        channel = after(channel, second, NO_CANDIDATE, TimePassed())
        channel = after(channel, second + 30, NOBODY, TimePassed())
        assert phase(channel) == "holding"
    assert phase(after(channel, 700, NO_CANDIDATE, TimePassed())) == "rolling_back"


def test_sight_in_between_begins_anew() -> None:
    channel = blind_for(holding(), 100, 250, NO_CANDIDATE)
    channel = after(channel, 260, SEEN)
    assert phase(blind_for(channel, 270, 420, NO_CANDIDATE)) == "holding"


def test_time_alone_acts_when_no_look_comes_any_more() -> None:
    channel = after(holding(), 100, NO_CANDIDATE)
    assert phase(after(channel, 279, TimePassed())) == "holding"
    assert phase(after(channel, 280, TimePassed())) == "rolling_back"


def test_people_are_told_once_and_when_it_is_over() -> None:
    channel = after(holding(), 100, NO_CANDIDATE)
    assert "blind" not in [entry.event for entry in channel.history]
    channel = blind_for(channel, 130, 250, NO_CANDIDATE)
    assert [entry.event for entry in channel.history].count("blind") == 1
    channel = after(channel, 260, SEEN)
    assert channel.history[-1].event == "sighted"
    told = {c.entry.event for c in commands_for(channel, at(260)) if isinstance(c, Notify)}
    assert {"blind", "sighted"} <= told


def test_a_blind_moment_is_not_worth_a_word() -> None:
    channel = after(after(holding(), 100, NO_CANDIDATE), 130, SEEN)
    assert not {"blind", "sighted"} & {entry.event for entry in channel.history}
    assert channel.rollout is not None
    assert channel.rollout.blind is None


def test_harm_acts_while_blind() -> None:
    channel = after(holding(), 100, NO_STABLE, Looked(make_verdict("HARM"), "look"))
    assert channel.rollout is not None
    assert (phase(channel), channel.rollout.ending) == ("rolling_back", "rolled_back")


def baking() -> Channel:
    channel = holding(steps=make_plan().steps[1:], bake_s=60.0)
    channel = after(channel, 12, route({"old": 50, "new": 50}, {"old": 180, "new": 20}))
    channel = after(channel, 20, route({"old": 50, "new": 50}, {"old": 280, "new": 120}))
    channel = after(channel, 100, SEEN, Looked(make_verdict("NON_INFERIOR"), "look"))
    assert phase(channel) == "baking"
    return channel


def test_a_bake_does_not_end_blind() -> None:
    both = servers(old="ready", new="ready")
    blind = after(baking(), 150, NO_CANDIDATE)
    assert phase(after(blind, 170, both)) == "baking"
    assert phase(after(blind, 170, SEEN, both)) == "scaling"


def test_a_bake_that_stays_blind_goes_back_to_the_old_release() -> None:
    channel = blind_for(baking(), 110, 290, NO_CANDIDATE)
    assert phase(channel) == "rolling_back"
    assert channel.stable is not None
    assert channel.stable.release_id == OLD
    assert channel.rollout is not None
    assert channel.rollout.ending == "withdrawn"


def test_before_exposure_nobody_needs_to_be_seen() -> None:
    channel = requested(used_channel(), make_plan())
    assert after(channel, 10, NOBODY) == channel


def test_broken_hardware_withdraws_and_does_not_reject() -> None:
    channel = after(holding(), 50, FuseBlown("Fuse: a device is broken.", against_release=False))
    assert channel.rollout is not None
    assert (channel.rollout.ending, channel.rejected) == ("withdrawn", ())
    channel = after(holding(), 50, FuseBlown("Fuse: executions failed."))
    assert channel.rollout is not None
    assert channel.rollout.ending == "rolled_back"
