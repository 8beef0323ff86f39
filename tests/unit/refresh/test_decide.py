"""What a refresh does about what it saw."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.refresh_world import NOW

from trainyard.documents.refresh import (
    KEPT_SUBJECTS,
    RefreshAttempt,
    RefreshRecord,
    RefreshSubject,
)
from trainyard.refresh.decide import (
    UNKNOWN,
    Decision,
    Facts,
    Hold,
    Subject,
    decide,
    hold_of,
    remembered,
)
from trainyard.spec.environments import Environment

R1, R2 = Subject("adder", "r1", "tools"), Subject("adder", "r2", "tools")
EMPTY = RefreshRecord(model="adder")


def attempts(count: int, *, subject: Subject = R2, state: str = "") -> RefreshRecord:
    """Return a record with so many runs of a subject; `state` is that of all but the last."""
    record = EMPTY
    for number in range(1, count + 1):
        made = RefreshAttempt(run_id=subject.run_id(number), asked_at=NOW)
        record = remembered(record, subject, attempt=made)
        if number < count:
            record = remembered(record, subject, states={made.run_id: "failed"})
    return remembered(record, subject, states={subject.run_id(count): state})


def decided(record: RefreshRecord = EMPTY, state: str = "", **facts: Any) -> Decision:
    known = record.subject(R2.id)
    states = {known.attempts[-1].run_id: state} if known and known.attempts and state else {}
    return decide(Facts(subject=R2, record=record, run_states=states, **facts))


def test_a_new_revision_starts_one_run_whose_id_follows_from_it() -> None:
    found = decided()
    assert (found.outcome, found.run_id) == ("start", f"refresh__adder__{R2.id}")
    assert found.reason == "Revision r2 is new."
    assert decided() == found


def test_the_revision_before_is_named() -> None:
    before = remembered(EMPTY, R1, released=["adder-000000000001"])
    assert decided(before).reason == "Revision r2 is new (before: r1)."


def test_another_toolchain_is_another_release_of_the_same_revision() -> None:
    old = Subject("adder", "r2", "older tools")
    found = decided(remembered(EMPTY, old, released=["adder-000000000001"]))
    assert found.outcome == "start"
    assert found.reason == "The toolchain of revision r2 has changed."
    assert old.run_id(1) != R2.run_id(1)


def test_what_is_released_is_nothing_new_whoever_released_it() -> None:
    found = decided(released=("adder-000000000001",))
    assert (found.outcome, found.run_id) == ("nothing_new", "")
    assert "released as adder-000000000001" in found.reason


@pytest.mark.parametrize("state", ["queued", "running", UNKNOWN, "restarting"])
def test_a_run_under_way_is_waited_for_also_when_somebody_insists(state: str) -> None:
    for again in (False, True):
        found = decided(attempts(1), state, again=again)
        assert (found.outcome, found.run_id) == ("under_way", R2.run_id(1))
    assert ("Airflow knows" in found.reason) == (state == UNKNOWN)


def test_a_run_that_was_written_down_and_never_began_is_begun() -> None:
    found = decided(attempts(1))
    assert (found.outcome, found.run_id) == ("start", R2.run_id(1))


def test_a_run_that_ended_well_is_enough() -> None:
    assert decided(attempts(1), "success").outcome == "nothing_new"


def test_a_failed_run_is_followed_by_so_many_as_the_spec_says() -> None:
    second = decided(attempts(1), "failed")
    assert (second.outcome, second.run_id) == ("start", f"{R2.run_id(1)}__2")
    assert second.reason.endswith("Run 2 of 2: the one before failed.")
    last = decided(attempts(2), "failed")
    assert (last.outcome, last.run_id) == ("given_up", R2.run_id(2))
    assert "until somebody asks for it again" in last.reason
    assert decided(attempts(2), "failed", max_attempts=3).outcome == "start"
    assert decided(attempts(1), "failed", max_attempts=1).outcome == "given_up"


def test_how_a_run_ended_is_known_when_airflow_has_forgotten_it() -> None:
    assert decided(attempts(2, state="failed")).outcome == "given_up"
    assert decided(attempts(1, state="success")).outcome == "nothing_new"


def test_a_person_may_ask_again() -> None:
    for record, released in ((attempts(2, state="failed"), ()), (EMPTY, ("adder-000000000001",))):
        found = decided(record, released=released, again=True)
        assert found.outcome == "start"
        assert "asked for revision r2 again" in found.reason
    assert decided(attempts(2, state="failed"), again=True).run_id == R2.run_id(3)


def test_a_release_waits_while_an_environment_takes_nothing() -> None:
    hold = Hold(NOW + timedelta(hours=5), "production takes no promotions: it is frozen.")
    found = decided(hold=hold)
    assert (found.outcome, found.until) == ("deferred", hold.until)
    assert found.reason == f"Revision r2 is new. {hold.reason}"
    assert decided(hold=hold, released=("x",)).outcome == "nothing_new"
    assert decided(hold=hold, again=True).outcome == "deferred"


def environment(**window: float) -> Environment:
    """Return an environment that is frozen between two hours from now."""
    (start, end), *_ = [window.values()]
    return Environment.model_validate(
        {
            "target": "cpu",
            "freeze": [
                {
                    "start": NOW + timedelta(hours=start),
                    "end": NOW + timedelta(hours=end),
                    "reason": "a fair",
                }
            ],
        }
    )


def test_all_environments_must_be_open_at_the_same_time() -> None:
    every = {"staging": environment(a=-1, b=2), "production": environment(a=1, b=4)}
    found = hold_of(("staging", "production"), every, NOW)
    assert found is not None
    assert found.until == NOW + timedelta(hours=4)
    assert found.reason == (
        "staging takes no promotions: it is frozen (a fair), until 2026-11-23 07:00 UTC."
    )
    assert hold_of(("production",), every, NOW) is None
    assert hold_of((), every, NOW) is None


def test_a_record_keeps_what_is_new_only() -> None:
    record = attempts(1)
    same = remembered(record, R2, attempt=RefreshAttempt(run_id=R2.run_id(1), asked_at=NOW))
    assert same is record
    assert remembered(EMPTY, R2) is EMPTY
    assert remembered(record, R2, states={R2.run_id(1): "running"}) is record


def test_a_record_forgets_its_oldest_subjects() -> None:
    record = EMPTY
    for number in range(KEPT_SUBJECTS + 3):
        record = remembered(record, Subject("adder", f"r{number}"), released=[f"adder-{number}"])
    assert len(record.subjects) == KEPT_SUBJECTS
    assert isinstance(record.subjects[0], RefreshSubject)
    assert record.subjects[0].revision == "r3"
    assert record.subjects[-1].revision == f"r{KEPT_SUBJECTS + 2}"
