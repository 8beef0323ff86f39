"""What comes out of the prefix cache is what went in."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.measure.behaviour.some_answers import NEAR_TIE, said
from tests.unit.measure.behaviour.test_batching import SETTING

from trainyard.measure.behaviour.prefix_cache import Shared, Warmed, judge, prompts_of, remark

LONG = replace(SETTING, max_model_len=256, block_size=32, vocabulary=tuple(range(5, 20)))


def test_prompts_share_more_than_a_block_and_end_differently() -> None:
    for prompts in prompts_of(LONG):
        assert len({prompt[:96] for prompt in prompts}) == 1
        assert len({prompt[96:] for prompt in prompts}) == len(prompts) == 3
    first, second = prompts_of(LONG)
    assert first[0][:4] != second[0][:4]


def test_prompts_leave_room_for_the_answer() -> None:
    small = replace(LONG, max_model_len=64, block_size=128)
    for prompts in prompts_of(small):
        assert all(len(prompt) + small.answer_tokens <= 64 for prompt in prompts)


def test_the_same_answer_from_the_cache_holds_and_another_is_broken() -> None:
    shared = (
        Shared((1, 2), said("640."), said("640.")),
        Shared((1, 3), said("140."), said("640.")),
    )
    assert [case.outcome for case in judge(Warmed(shared, 32), NEAR_TIE)] == ["held", "broken"]


def test_it_is_told_whether_anything_came_out_of_the_cache() -> None:
    assert remark(Warmed((), 128), LONG) == "128 tokens came out of the cache."
    assert "counted nothing" in remark(Warmed((), 0), LONG)
    assert "does not count" in remark(Warmed((), None), LONG)
    assert "is off" in remark(Warmed((), 0), replace(LONG, prefix_caching=False))
