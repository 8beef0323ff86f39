"""Which prompt is next, and who gets it."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from trainyard.rollout.probes.schedule import Schedule

SERVERS = st.integers(1, 9)


def names(side: str, count: int) -> list[str]:
    return [f"{side}-{number}" for number in range(count)]


@given(prompts=st.integers(1, 30), seed=st.text(max_size=5))
def test_every_prompt_is_scored_once_and_sent_as_often_as_every_other(
    prompts: int, seed: str
) -> None:
    schedule = Schedule(prompts, seed)
    rounds = [schedule.next(["s"], ["c"]) for _ in range(3 * prompts)]
    assert sorted(one.prompt for one in rounds if one.scored) == list(range(prompts))
    assert set(Counter(one.prompt for one in rounds).values()) == {3}
    assert all(one.scored for one in rounds[:prompts])


@given(prompts=st.integers(1, 30), cursor=st.integers(0, 90))
def test_whoever_goes_on_at_the_cursor_sends_what_would_have_come(
    prompts: int, cursor: int
) -> None:
    whole = Schedule(prompts, "model/production/7")
    for _ in range(cursor):
        whole.next(["s"], ["c"])
    later = Schedule(prompts, "model/production/7", cursor)
    for _ in range(5):
        assert later.next(["s"], ["c"]) == whole.next(["s"], ["c"])
    assert later.cursor == whole.cursor == cursor + 5


def test_each_rollout_has_an_order_of_its_own() -> None:
    one, other = (Schedule(50, seed) for seed in ("a/production/1", "a/production/2"))
    orders = [[schedule.next(["s"], ["c"]).prompt for _ in range(50)] for schedule in (one, other)]
    assert orders[0] != orders[1]


@given(stables=SERVERS, candidates=SERVERS)
def test_every_server_of_either_release_gets_as_many(stables: int, candidates: int) -> None:
    stable, candidate = names("s", stables), names("c", candidates)
    schedule = Schedule(10, "seed")
    counts: Counter[str] = Counter()
    for _ in range(2 * max(stables, candidates)):
        one = schedule.next(stable, candidate)
        assert one.stable
        assert one.candidate
        assert len(set(one.stable)) == len(one.stable)
        counts.update((*one.stable, *one.candidate))
    assert set(counts) == {*stable, *candidate}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_servers_that_come_and_go_are_no_trouble() -> None:
    schedule = Schedule(3, "seed")
    for stables, candidates in ((3, 1), (3, 2), (1, 2), (2, 2), (9, 1)):
        one = schedule.next(names("s", stables), names("c", candidates))
        assert 1 <= len(one.stable) <= stables
        assert 1 <= len(one.candidate) <= candidates
