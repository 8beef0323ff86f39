"""Where channels stand, as a table, as a page for the terminal, and as JSON."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from rich.console import Console
from tests.unit.rollout.machine import (
    NEW,
    NOW,
    OLD,
    empty_channel,
    make_plan,
    make_verdict,
    requested,
    used_channel,
)

from trainyard.documents.channel import Beyond, Channel, Waiting, Weights
from trainyard.documents.evidence import Block, JudgeSpec, default_metrics, ending_metrics
from trainyard.reports.standing import (
    RouteLine,
    ServerLine,
    Standing,
    standing_detail,
    standing_of,
    standings_table,
)
from trainyard.rollout.events import PauseRequested
from trainyard.rollout.judge import judge
from trainyard.rollout.state_machine import step

END = Block(
    t=30.0,
    duration_s=30.0,
    release=OLD,
    track="stable",
    pod="a",
    metric="truncated",
    kind="count",
    requests=100,
    bad=3,
    weight_candidate=50,
)


def printed(what: Any) -> str:
    console = Console(width=200, record=True, emoji=False)
    with console.capture() as capture:
        console.print(what, markup=False, highlight=False)
    return capture.get()


def held(**changes: Any) -> Channel:
    """Return a channel whose candidate has a tenth of the traffic."""
    channel = requested(used_channel(), make_plan())
    assert channel.rollout is not None
    values = {
        "phase": "holding",
        "exposed_since": NOW,
        "verdict": make_verdict("UNDECIDED"),
        **changes,
    }
    rollout = channel.rollout.model_copy(update=values)
    return channel.model_copy(
        update={"rollout": rollout, "weights": Weights(stable=90, candidate=10)}
    )


def asked(standing: Standing, **changes: Any) -> Standing:
    servers = (ServerLine(name=f"{NEW}-0", release_id=NEW, state="ready", message="It [serves]."),)
    values = {
        "lease": "alive",
        "servers": servers,
        "route": RouteLine(weights={OLD: 90, NEW: 10}, guard="following"),
        "can": ("pause", "abort"),
        **changes,
    }
    return standing.model_copy(update=values)


def test_a_channel_that_serves_is_one_line() -> None:
    one = standing_of(used_channel(), NOW)
    text = printed(standings_table([asked(one)]))
    assert one.state == "serving"
    assert OLD in text
    assert "alive" not in text


@pytest.mark.parametrize(
    ("lease", "words"),
    [
        ("alive", "alive"),
        ("expired", "nobody drives it"),
        ("absent", "nobody drives it"),
        ("unknown", "cannot be asked"),
    ],
)
def test_a_rollout_says_whether_somebody_drives_it(lease: Any, words: str) -> None:
    text = printed(standings_table([asked(standing_of(held(), NOW), lease=lease)]))
    assert f"{NEW} (10 %)" in text
    assert words in text


def baking(**route: Any) -> Standing:
    """Return a bake in which the new release is wished half of the traffic."""
    channel = held(phase="baking", phase_since=NOW)
    tracks = {"stable": channel.candidate, "candidate": channel.stable}
    wished = channel.model_copy(update={**tracks, "weights": Weights(stable=50, candidate=50)})
    return asked(standing_of(wished, NOW), lease="expired", route=RouteLine(**route))


def test_the_table_shows_the_route_as_it_is() -> None:
    lost = baking(
        weights={NEW: 0, OLD: 100}, guard="lease_expired", guard_reason="The lease [is] over."
    )
    text = printed(standings_table([lost, asked(standing_of(used_channel(), NOW))]))
    row, _, *lines = text.splitlines()[1:]
    assert f"{NEW} (0 %, 50 % wished)" in row
    assert f"{OLD} (100 %, 50 % wished)" in row
    assert "NOT as wished: lease expired" in row
    assert f"{OLD} 100 %. The guard, lease expired: The lease [is] over." in " ".join(lines)
    assert text.count("The route does not follow the channel") == 2, "the other row has {OLD: 90}"


def test_a_route_that_follows_is_as_wished_and_one_that_is_late_says_so() -> None:
    agreed = baking(weights={NEW: 50, OLD: 50}, guard="following")
    assert "as wished" in printed(standings_table([agreed]))
    assert "NOT" not in printed(standings_table([agreed]))
    late = baking(weights={NEW: 0, OLD: 100}, guard="following")
    assert "NOT as wished: not yet" in printed(standings_table([late]))
    assert "It does not follow the channel yet." in printed(standing_detail(late, ()))


def test_without_a_router_shares_are_wishes() -> None:
    text = printed(standings_table([asked(standing_of(held(), NOW), route=None)]))
    assert f"{NEW} (10 % wished)" in text
    assert "cannot be asked" in text
    nothing = printed(standings_table([standing_of(empty_channel(), NOW)]))
    assert "cannot be asked" not in nothing


def test_the_number_of_the_rollout_is_shown() -> None:
    channel = held()
    assert channel.rollout is not None
    number = str(channel.rollout.number)
    one = asked(standing_of(channel, NOW))
    assert number in printed(standings_table([one])).splitlines()[1].split()
    detail = printed(standing_detail(one, channel.history)).splitlines()
    assert any(line.split()[:2] == ["Rollout", number] for line in detail)
    (event,) = (line for line in detail if "rollout_started" in line)
    assert event.split()[2:4] == [number, "rollout_started"]


def test_the_detail_has_all_that_helps_at_night() -> None:
    channel = held()
    later = NOW + timedelta(seconds=100)
    text = printed(standing_detail(asked(standing_of(channel, later)), channel.history))
    for words in (
        "holding, step 1 of 2",
        f"{OLD} 90 %, {NEW} 10 %",
        "Exposure",
        "500 s left",
        "UNDECIDED: The judge says UNDECIDED.",
        "It [serves].",
        "rollout_started",
        "You can: pause, abort.",
    ):
        assert words in text


def test_what_can_only_show_harm_does_not_look_like_waiting() -> None:
    rows = [END, END.model_copy(update={"track": "candidate", "pod": "b", "release": NEW})]
    spec = JudgeSpec(metrics=(*default_metrics(), *ending_metrics({})), max_duration_s=600)
    text = printed(standing_detail(standing_of(held(verdict=judge(rows, spec)), NOW), ()))
    told = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "UNDECIDED" in told["ttft"]
    assert "no harm shown" in told["truncated"]
    assert told["truncated"].rstrip().endswith("-")
    assert told["empty"].count("no data") == 3


def test_what_cannot_be_asked_is_said() -> None:
    channel = held()
    one = standing_of(channel, NOW)
    text = printed(standing_detail(one, channel.history))
    assert "the router cannot be asked" in text
    assert "the host cannot be asked" in text
    assert "cannot be asked" in text
    guarded = asked(one, route=RouteLine(weights={}, guard="lease_expired", guard_reason="Gone."))
    assert "lease expired: Gone." in printed(standing_detail(guarded, ()))


def test_a_pause_and_those_who_wait_are_shown() -> None:
    channel = step(held(), PauseRequested("Look at it.", "ann"), NOW)[0]
    waiting = Waiting(run_id="run-2", release_id=OLD, since=NOW, seen_at=NOW)
    channel = channel.model_copy(update={"waiting": (waiting,)})
    one = standing_of(channel, NOW + timedelta(seconds=400))
    assert one.state == "holding, paused"
    assert one.paused is not None
    assert one.paused.left_s == 4 * 3600 - 400
    assert one.limits[0].left_s == 600, "the exposure stands still in a pause"
    text = printed(standing_detail(one, channel.history))
    assert "by ann, 14000 s left: Look at it." in text
    assert f"{OLD}, since 12:00:00" in text


def test_traffic_that_was_not_measured_is_said() -> None:
    why = "at least 10% of the newest 100 prompts are longer"
    one = standing_of(held(beyond=(Beyond(kind="prompts", since=NOW, why=why),)), NOW)
    assert one.beyond == (why,)
    assert f"Not measured  {why}" in printed(standing_detail(one, ()))
    assert "Not measured" not in printed(standing_detail(standing_of(held(), NOW), ()))


@pytest.mark.parametrize(
    ("changes", "name", "left_s"),
    [
        ({"phase": "deploying", "exposed_since": None}, "deploy", 290.0),
        ({"phase": "baking", "phase_since": NOW}, "bake", 50.0),
        ({"held_since": NOW}, "hold", 290.0),
    ],
)
def test_the_limit_that_runs_is_named(changes: dict[str, Any], name: str, left_s: float) -> None:
    (limit,) = standing_of(held(**changes), NOW + timedelta(seconds=10)).limits
    assert (limit.name, limit.left_s) == (name, left_s)
    assert standing_of(held(outcome="withdrawn"), NOW).limits == ()


def test_programs_get_the_same_as_json() -> None:
    one = asked(standing_of(held(), NOW))
    again = Standing.model_validate(json.loads(json.dumps(one.model_dump(mode="json"))))
    assert again == one
    assert standing_of(empty_channel(), NOW).state == "empty"
