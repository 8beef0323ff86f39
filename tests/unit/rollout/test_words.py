"""Lines for people."""

from __future__ import annotations

import pytest
from tests.unit.rollout.machine import NEW, NOW

from trainyard.documents.channel import HistoryEntry
from trainyard.documents.evidence import MetricVerdict, Verdict
from trainyard.rollout.state_machine import NOTABLE
from trainyard.rollout.words import describe_entry, describe_look


def entry(event: str, *, who: str = "", **detail: object) -> HistoryEntry:
    return HistoryEntry(at=NOW, generation=1, event=event, release_id=NEW, who=who, detail=detail)


def metric(name: str, **figures: float | None) -> MetricVerdict:
    values = {
        "stable_value": 0.029,
        "candidate_value": 0.031,
        "ratio": 0.031 / 0.029,
        "harm_evidence": 1.3,
        "harm_threshold": 5.7,
        **figures,
    }
    return MetricVerdict(
        metric=name,
        outcome="UNDECIDED",
        harm_margin=0.1,
        promote_margin=0.15,
        promote_evidence=0.4,
        promote_threshold=3.0,
        stable_requests=100,
        candidate_requests=100,
        blocks=3,
        note="",
        **values,
    )


def test_a_look_is_one_line_with_figures() -> None:
    verdict = Verdict(
        outcome="UNDECIDED",
        metrics=(
            metric("ttft"),
            metric("errors", stable_value=0.0, candidate_value=0.015, ratio=None),
            metric("ttft_tail", stable_value=None, candidate_value=None, ratio=None),
        ),
        looks=3,
        exposed_requests=100,
        at=90.0,
        reason="",
    )
    assert describe_look(7, 10, verdict) == (
        "look 7 at 10 %: ttft 31 ms vs 29 ms (+7%), evidence of harm 1.3 of 5.7, of quality 0.4 of "
        "3.0; errors 1.50% vs 0.00%, evidence of harm 1.3 of 5.7, of quality 0.4 of 3.0; "
        "ttft_tail not comparable yet; undecided"
    )


def test_a_metric_that_can_only_show_harm_is_named_when_it_says_something() -> None:
    quiet, loud, absent = (
        metric(name, stable_value=stable, candidate_value=stable, ratio=1.0).model_copy(
            update={"promote_evidence": 0.0, "promote_threshold": 0.0, "harm_evidence": evidence}
        )
        for name, stable, evidence in (
            ("aborted", 0.0, -0.1),
            ("truncated", 0.1, 1.3),
            ("empty", None, 0.0),
        )
    )
    verdict = Verdict(
        outcome="UNDECIDED",
        metrics=(quiet, loud, absent),
        looks=3,
        exposed_requests=100,
        at=90.0,
        reason="",
    )
    assert describe_look(7, 10, verdict) == (
        "look 7 at 10 %: truncated 10.00% vs 10.00% (+0%), evidence of harm 1.3 of 5.7; undecided"
    )


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (entry("weights", weight=10, step=1), f"{NEW} gets 10 % of the traffic"),
        (entry("ending", outcome="rolled_back", why="Harm."), "goes back (rolled_back): Harm."),
        (entry("rolled_back", why="Harm."), "rolled back and rejected: Harm."),
        (entry("withdrawn", who="ann", why="Enough."), "Enough. (asked for by ann)"),
        (entry("held", after_s=600.0, until_s=60.0, why="Hm."), "undecided after 600 s"),
        (entry("bake_anew", away_s=90.0), "nobody drove the bake for 90 s: it begins anew"),
        (entry("stable_down", alone="other"), f"{NEW} has no ready server: other serves alone"),
        (
            entry("beyond_envelope", kind="rate", why="5 a second"),
            f"live traffic is beyond what {NEW} was measured with: 5 a second",
        ),
    ],
)
def test_events_are_told(told: HistoryEntry, line: str) -> None:
    assert line in describe_entry(told)


@pytest.mark.parametrize("name", sorted(NOTABLE))
def test_an_event_of_another_version_is_told_by_its_name_at_least(name: str) -> None:
    assert describe_entry(entry(name))
    assert describe_entry(entry("something_new")) == "something new"
