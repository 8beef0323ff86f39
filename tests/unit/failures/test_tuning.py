"""What the next try changes, and when nothing is left to change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.failures.table import Change
from trainyard.failures.tuning import Tuning, next_tuning


def tries(change: Change, workers: int | None) -> list[Tuning | None]:
    """Return what one try after the other changes, if all fail in the same way."""
    found: list[Tuning | None] = []
    now: Tuning | None = Tuning()
    while now is not None and len(found) < 10:
        now = next_tuning(change, now, workers=workers)
        found.append(now)
    return found


def test_memory_halves_the_compiler_processes_until_one_is_left() -> None:
    assert tries("halve workers", 8)[:3] == [Tuning(4, 1), Tuning(2, 2), Tuning(1, 3)]
    assert tries("halve workers", 8)[3] is None


def test_a_compiler_that_runs_alone_gets_more_memory_twice() -> None:
    assert tries("halve workers", 1) == [Tuning(1, 1), Tuning(1, 2), None]


def test_a_race_of_compilers_leaves_one_at_once_and_is_tried_once() -> None:
    assert tries("one worker", 8) == [Tuning(1, 0), None]
    assert tries("one worker", 1) == [None]


def test_a_step_without_compilers_only_gets_more_memory() -> None:
    assert tries("halve workers", None)[:3] == [Tuning(None, 1), Tuning(None, 2), Tuning(None, 3)]


def test_other_failures_change_nothing() -> None:
    assert next_tuning("", Tuning(2, 1), workers=8) == Tuning(2, 1)


@given(st.none() | st.integers(1, 64), st.integers(0, 9))
def test_it_survives_the_status_document(workers: int | None, memory: int) -> None:
    tuning = Tuning(workers, memory)
    assert Tuning.from_json(tuning.to_json()) == tuning


@pytest.mark.parametrize("value", [None, [], {"parallel_compile_workers": "4"}, {"x": 1}, {}])
def test_what_nobody_can_read_is_as_usual(value: object) -> None:
    assert Tuning.from_json(value) == Tuning()
