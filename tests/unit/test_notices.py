"""What people are told, and who wants to be told."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from trainyard.documents.channel import HistoryEntry
from trainyard.notices import notice_of, ways_of_telling
from trainyard.rollout.words import describe_entry
from trainyard.spec.environments import Environments

NOW = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)
RELEASE = "adder-0123456789ab"


def entry(event: str, **detail: Any) -> HistoryEntry:
    return HistoryEntry(
        at=NOW, generation=7, event=event, release_id=RELEASE, rollout=2, who="ada", detail=detail
    )


@pytest.mark.parametrize(
    ("event", "kind", "headline"),
    [
        ("promoted", "promoted", f"{RELEASE} is promoted in production"),
        ("rolled_back", "rolled_back", f"{RELEASE} was rolled back in production"),
        ("returned", "rolled_back", f"{RELEASE} serves again in production: it was rolled back to"),
        ("withdrawn", "withdrawn", f"{RELEASE} was withdrawn in production"),
    ],
)
def test_ends_of_rollouts_are_told_with_their_reason(event: str, kind: str, headline: str) -> None:
    happened = entry(event, why="Three times slower.")
    notice = notice_of("adder", "production", 2, happened, describe_entry(happened))
    assert notice is not None
    assert (notice.kind, notice.headline) == (kind, headline)
    assert "Three times slower." in notice.text
    assert notice.id == f"adder/production/2/7/{event}"
    assert notice.as_json()["headline"] == headline
    assert notice.as_json()["at"] == "2026-11-27T12:00:00Z"


def test_an_alarm_of_the_watch_is_told() -> None:
    missed = entry("slo_missed", alert="ttft", why="Slow for an hour.")
    notice = notice_of("adder", "production", 2, missed, "it misses ttft")
    assert notice is not None
    assert notice.headline == f"{RELEASE} misses its objectives in production"
    assert notice.text == "It misses ttft"


def test_a_hold_is_told() -> None:
    held = entry("held", after_s=60.0, until_s=300.0, why="Too few requests.")
    notice = notice_of("adder", "production", 2, held, describe_entry(held))
    assert notice is not None
    assert notice.kind == "held"
    assert notice.text.startswith("Undecided after 60 s")


@pytest.mark.parametrize("event", ["weights", "deployed", "rollout_started", "driver"])
def test_steps_on_the_way_are_told_to_nobody(event: str) -> None:
    assert notice_of("adder", "production", 2, entry(event), "x") is None


def test_who_wants_to_be_told_is_told_once() -> None:
    slack = {"kind": "slack", "connection": "slack"}
    hook = {"kind": "webhook", "connection": "hook", "events": ["promoted", "gate_failed"]}
    file = Environments.model_validate(
        {
            "schema": "trainyard/v1",
            "notify": [hook],
            "environments": {
                "staging": {"target": "cpu"},
                "production": {"target": "cpu", "notify": [slack, hook]},
            },
        }
    )

    def connections(kind: Any, *among: str) -> list[str]:
        return [way.connection for way in ways_of_telling(file, kind, among)]

    assert connections("promoted", "production") == ["hook"]
    assert connections("gate_failed", "staging", "production") == ["hook", "slack"]
    assert connections("held", "production") == ["slack"]
    assert connections("held", "staging", "elsewhere") == []
