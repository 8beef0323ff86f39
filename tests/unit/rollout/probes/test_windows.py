"""When there are probes, and when only users' requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.rollout.probes.windows import Windows, lag_s
from trainyard.spec.metrics import MetricsSource

WINDOWS = st.builds(Windows, block_s=st.floats(1, 60), lag_s=st.sampled_from([0.0, 20.0, 75.0]))


def test_slices_take_turns() -> None:
    windows = Windows(block_s=30)
    assert [windows.has_probes(slot) for slot in range(4)] == [True, False, True, False]
    assert [windows.is_for_users(slot) for slot in range(4)] == [False, True, False, True]
    assert windows.users_share == 0.5
    # What is not sent in every other slice, and in the last fifth of the others, is made up for.
    assert windows.pace == pytest.approx(2.5)


def test_figures_that_lag_behind_have_slices_of_rest_in_between() -> None:
    windows = Windows(block_s=30, lag_s=45)
    kinds = [
        "probes" if windows.has_probes(s) else "users" if windows.is_for_users(s) else "rest"
        for s in range(windows.period)
    ]
    assert kinds == ["probes"] * 3 + ["rest"] * 2 + ["users"] * 3


@given(windows=WINDOWS, slot=st.integers(0, 1000), into=st.floats(0, 1))
def test_nothing_is_sent_outside_of_the_slices_with_probes(
    windows: Windows, slot: int, into: float
) -> None:
    left_s = (1 - into) * windows.block_s
    for slowest_s in (0.0, 5.0, 1000.0):
        send_s = windows.sending_s(slot, left_s, slowest_s=slowest_s)
        end_s = left_s
        number = slot
        while windows.has_probes(number) and windows.has_probes(number + 1):
            number += 1
            end_s += windows.block_s
        assert send_s >= 0
        if send_s:
            assert windows.has_probes(slot)
            # What is sent last has the rest of the slice for its answer.
            assert send_s <= end_s - 0.2 * windows.block_s + 1e-9


def test_slow_answers_get_more_time_but_are_still_asked_for() -> None:
    windows = Windows(block_s=30)
    assert windows.sending_s(0, 30.0) == pytest.approx(24.0)
    assert windows.sending_s(0, 30.0, slowest_s=10.0) == pytest.approx(15.0)
    assert windows.sending_s(0, 30.0, slowest_s=500.0) == pytest.approx(6.0)
    assert windows.sending_s(1, 30.0) == 0.0


def test_only_what_somebody_else_has_read_lags_behind() -> None:
    assert lag_s(MetricsSource()) == 0.0
    source = MetricsSource(source="prometheus", url="http://p:9090", freshness_s=45, delay_s=30)
    assert lag_s(source) == 75.0
