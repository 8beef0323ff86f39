"""Counters of what came of probes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainyard.documents.look import ProbeCounters
from trainyard.rollout.probes.answers import Answer
from trainyard.rollout.probes.schedule import Round, Schedule
from trainyard.rollout.probes.tally import Tally

RELEASES = {"s0": "old", "s1": "old", "c0": "new"}
GOOD = Answer(text="x", tokens=None, ttft_s=0.05, tpot_s=0.004)
ONE_TOKEN = Answer(text="x", tokens=None, ttft_s=0.3, tpot_s=None)


def counted(
    stable: dict[str, Answer | None],
    candidate: dict[str, Answer | None],
    verdict: tuple[bool, bool] | None = None,
) -> dict[str, ProbeCounters]:
    tally = Tally()
    one = Round(0, True, tuple(stable), tuple(candidate))
    tally.sent(one, RELEASES)
    tally.ended(one, stable, candidate, verdict)
    return {each.pod: each for each in tally.counters()}


def test_answers_and_their_times_are_counted_by_server() -> None:
    found = counted({"s0": GOOD}, {"c0": ONE_TOKEN})
    stable, candidate = found["s0"], found["c0"]
    assert (stable.release_id, stable.sent, stable.ended, stable.answered) == ("old", 1, 1, 1)
    assert (stable.ttft.count, stable.ttft.total) == (1, 0.05)
    assert (stable.ttft.buckets["0.04"], stable.ttft.buckets["0.06"]) == (0, 1)
    assert (stable.tpot.count, candidate.tpot.count) == (1, 0)
    assert candidate.ttft.buckets["+Inf"] == 1


def test_a_failure_counts_if_the_other_release_answered() -> None:
    found = counted({"s0": GOOD, "s1": None}, {"c0": None})
    assert (found["c0"].failed, found["c0"].answered) == (1, 0)
    # Of stable's two, one was answered, and nobody of the candidate's.
    assert (found["s1"].failed, found["s1"].ended) == (0, 1)
    assert (found["s0"].answered, found["s0"].failed) == (1, 0)


def test_what_fails_on_both_sides_is_nobodys_fault() -> None:
    found = counted({"s0": None}, {"c0": None})
    assert all((each.failed, each.answered, each.ended) == (0, 0, 1) for each in found.values())


def test_a_pair_is_counted_for_the_first_server_of_each_side() -> None:
    found = counted({"s0": GOOD, "s1": GOOD}, {"c0": GOOD}, (False, True))
    assert [(found[name].pairs, found[name].worse) for name in ("s0", "s1", "c0")] == [
        (1, 0),
        (0, 0),
        (1, 1),
    ]


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=12))
def test_counters_only_grow_and_add_up(outcomes: list[tuple[bool, bool, bool]]) -> None:
    tally, schedule = Tally(), Schedule(5, "seed")
    before: dict[str, ProbeCounters] = {}
    for stable_answers, candidate_answers, worse in outcomes:
        one = schedule.next(["s0", "s1"], ["c0"])
        tally.sent(one, RELEASES)
        both = stable_answers and candidate_answers
        tally.ended(
            one,
            dict.fromkeys(one.stable, GOOD if stable_answers else None),
            dict.fromkeys(one.candidate, GOOD if candidate_answers else None),
            (False, worse) if both and one.scored else None,
        )
        now = {each.pod: each for each in tally.counters()}
        for name, each in now.items():
            assert each.sent == each.ended >= each.answered + each.failed
            assert each.ttft.count == each.answered
            assert each.worse <= each.pairs <= each.answered
            old = before.get(name)
            assert old is None or (each.sent >= old.sent and each.answered >= old.answered)
        sides = [sum(e.pairs for e in now.values() if e.release_id == r) for r in ("old", "new")]
        assert sides[0] == sides[1]
        before = now
