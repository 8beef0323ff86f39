"""A channel in a line, a rollout in its stages."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.unit.reports.test_pages import channel, rollout
from tests.unit.yard import MOMENT

from trainyard.documents.channel import HistoryEntry, Track
from trainyard.reports.glance import glance, stages

LATER = MOMENT + timedelta(minutes=5)


def moving(**changes: Any) -> Any:
    return rollout(outcome=None, **{"phase": "holding", "phase_since": LATER, **changes})


def test_an_idle_channel_is_since_its_stable_release() -> None:
    row = glance(channel(rollout=None))
    assert (row.state, row.tone, row.since) == ("serving", "pass", MOMENT)
    assert row.in_progress is False


def test_a_moving_channel_is_since_its_phase_and_by_who_asked() -> None:
    row = glance(channel(rollout=moving(requested_by="ada", step_index=1)))
    assert (row.state, row.tone, row.since) == ("holding, step 2 of 2", "busy", LATER)
    assert (row.by, row.in_progress) == ("ada", True)


@pytest.mark.parametrize(
    ("now", "state", "tone"),
    [
        (moving(held_since=LATER), "holding, undecided", "warn"),
        (moving(phase="rolling_back"), "rolling back", "fail"),
        (moving(phase="warming"), "warming", "busy"),
        (rollout(outcome="promoted"), "serving", "pass"),
        (rollout(outcome="rolled_back"), "rolled back", "fail"),
        (rollout(outcome="withdrawn"), "withdrawn", "warn"),
    ],
)
def test_the_state_is_in_words(now: Any, state: str, tone: str) -> None:
    row = glance(channel(rollout=now))
    assert (row.state, row.tone) == (state, tone)


def test_an_empty_channel_says_so() -> None:
    row = glance(channel(stable=None, rollout=None, history=()))
    assert (row.state, row.stable, row.since, row.by) == ("empty", "", None, "")


def test_whoever_made_the_stable_release_stable_is_named_after_later_rollouts() -> None:
    stable = Track(release_id="adder-aaaaaaaaaaaa", since=MOMENT)
    history = (
        HistoryEntry(at=MOMENT, event="requester", release_id="adder-aaaaaaaaaaaa", who="grace"),
        HistoryEntry(at=LATER, event="rollout_started", release_id="adder-bbbbbbbbbbbb", who="ada"),
    )
    assert glance(channel(stable=stable, history=history, rollout=rollout())).by == "grace"


def shown(now: Any) -> str:
    marks = {"done": "+", "now": ">", "stopped": "x", "open": "."}
    return "".join(marks[stage.state] for stage in stages(now))


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (moving(phase="deploying"), ">...."),
        (moving(phase="warming"), "+>..."),
        (moving(phase="holding", exposed_since=LATER, step_index=0), "++>.."),
        (moving(phase="shifting", exposed_since=LATER, step_index=1), "+++>."),
        (moving(phase="baking", exposed_since=LATER, step_index=1), "++++>"),
        (moving(phase="scaling", ending="promoted"), "+++++"),
        (rollout(outcome="promoted", phase="idle"), "+++++"),
        (moving(phase="rolling_back", exposed_since=LATER, step_index=1), "+++x."),
        (rollout(outcome="rolled_back", phase="idle", exposed_since=LATER), "++x.."),
        (rollout(outcome="withdrawn", phase="idle", exposed_since=None), "+x..."),
    ],
)
def test_stages_show_how_far_it_is(now: Any, expected: str) -> None:
    assert shown(now) == expected


def test_a_rollback_and_a_bootstrap_have_no_steps() -> None:
    for kind, last in (("rollback", "all traffic"), ("bootstrap", "bake")):
        plan = rollout().plan.model_copy(update={"kind": kind})
        labels = [stage.label for stage in stages(moving(phase="warming", plan=plan))]
        assert labels == ["deploy", "warm up", last]
