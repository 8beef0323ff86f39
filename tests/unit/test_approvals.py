"""Rounds of approval: who has said what, what counts, and what a rollout may rest on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.rollout_world import ENVIRONMENT, MODEL, MemoryStore, World

from trainyard.approvals import (
    Answer,
    Round,
    close_round,
    demand_approval,
    record_answer,
    round_of_run,
    rounds_in,
)
from trainyard.errors import Refused
from trainyard.releases import list_attestations
from trainyard.spec.ways import Approval

START = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)
RELEASE = "adder-0123456789ab"
RUN = "neuron_promote__production/p-1"


class Question:
    """A run's question, and a clock that goes on with each answer."""

    def __init__(self, *, needs: int = 1, run_id: str = RUN, store: Any = None) -> None:
        self.store = store or MemoryStore()
        self.needs, self.run_id = needs, run_id
        self.at = START

    def say(self, answer: Answer, who: str = "", note: str = "") -> Round | None:
        self.at += timedelta(seconds=1)
        details: dict[str, Any] = {}
        if answer == "asked":
            until = self.at + timedelta(hours=1)
            details = {"needs": self.needs, "expires_at": until.isoformat(), "requested_by": "ada"}
        record_answer(
            self.store,
            MODEL,
            RELEASE,
            answer,
            environment=ENVIRONMENT,
            run_id=self.run_id,
            at=self.at,
            who=who,
            note=note,
            **details,
        )
        return self.round()

    def round(self) -> Round | None:
        return round_of_run(self.store, MODEL, RELEASE, environment=ENVIRONMENT, run_id=self.run_id)

    def demand(self) -> None:
        demand_approval(self.store, MODEL, RELEASE, environment=ENVIRONMENT, run_id=self.run_id)


def test_nothing_is_approved_before_anybody_is_asked() -> None:
    question = Question()
    question.say("approved", "bob")
    assert question.round() is None
    with pytest.raises(Refused, match="has none for this run"):
        question.demand()


def test_one_who_approves_is_enough_for_one() -> None:
    question = Question()
    asked = question.say("asked")
    assert asked is not None
    assert asked.waits(question.at)
    assert not asked.waits(question.at + timedelta(hours=2))
    found = question.say("approved", "bob", "looks good")
    assert found is not None
    assert (found.approved, found.last) == (("bob",), "bob approved (looks good)")
    assert not found.waits(question.at)
    question.demand()


def test_two_are_two_different_people() -> None:
    question = Question(needs=2)
    question.say("asked")
    for _ in range(2):
        question.say("approved", "bob")
    with pytest.raises(Refused):
        question.demand()
    question.say("approved", "eve")
    question.demand()


@pytest.mark.parametrize("answer", ["rejected", "closed"])
def test_a_no_ends_the_round_whoever_had_approved(answer: Any) -> None:
    question = Question(needs=2)
    question.say("asked")
    question.say("approved", "bob")
    question.say(answer, "eve", "not today")
    question.say("approved", "eve")
    with pytest.raises(Refused, match=r"eve approved|not today"):
        question.demand()
    found = question.round()
    assert found is not None
    assert found.ended == answer


def test_asking_again_begins_anew() -> None:
    question = Question()
    question.say("asked")
    question.say("rejected", "eve")
    again = question.say("asked")
    assert again is not None
    assert (again.approved, again.ended) == ((), "")
    question.say("approved", "bob")
    question.demand()


def test_an_answer_that_does_not_count_changes_nothing() -> None:
    question = Question()
    question.say("asked")
    found = question.say("ignored", "ada", "their own")
    assert found is not None
    assert found.approved == ()
    assert found.waits(question.at)


def test_the_approval_of_another_run_or_environment_counts_for_nothing() -> None:
    question = Question()
    question.say("asked")
    question.say("approved", "bob")
    with pytest.raises(Refused):
        Question(run_id="neuron_promote__production/p-2", store=question.store).demand()
    with pytest.raises(Refused):
        demand_approval(question.store, MODEL, RELEASE, environment="staging", run_id=RUN)


def test_a_round_is_closed_once_and_only_if_it_is_open() -> None:
    question = Question()

    def close() -> None:
        close_round(
            question.store,
            MODEL,
            RELEASE,
            environment=ENVIRONMENT,
            run_id=RUN,
            at=question.at + timedelta(seconds=1),
            note="its run has ended",
        )

    close()
    question.say("asked")
    for _ in range(2):
        close()
    kinds = [
        each.subject["answer"]
        for each in list_attestations(question.store, MODEL, RELEASE, "approval")
    ]
    assert sorted(kinds) == ["asked", "closed"]
    approved = Question(run_id="neuron_promote__production/p-2", store=question.store)
    approved.at = question.at + timedelta(minutes=1)
    approved.say("asked")
    approved.say("approved", "bob")
    rounds = rounds_in(list_attestations(question.store, MODEL, RELEASE))
    assert [(each.run_id, each.ended) for each in rounds] == [
        (approved.run_id, ""),
        (RUN, "closed"),
    ]


def test_a_rollout_begins_only_with_approval_whatever_state_the_task_has() -> None:
    """Somebody may mark the task that waits as done; that approves nothing."""
    world = World()
    release_id = world.publish("a")
    environment = world.environments[ENVIRONMENT]
    world.environments[ENVIRONMENT] = environment.model_copy(update={"approval": Approval()})
    with pytest.raises(Refused, match="only with approval"):
        world.promote(release_id, run_id=RUN)
    assert world.channel.rollout is None
    record = {"environment": ENVIRONMENT, "run_id": RUN}
    until = (START + timedelta(hours=1)).isoformat()
    asked = {"needs": 1, "expires_at": until}
    record_answer(world.store, MODEL, release_id, "asked", at=START, **record, **asked)
    at = START + timedelta(seconds=1)
    record_answer(world.store, MODEL, release_id, "approved", at=at, who="bob", **record)
    world.promote(release_id, run_id=RUN)
    assert world.channel.rollout is not None
