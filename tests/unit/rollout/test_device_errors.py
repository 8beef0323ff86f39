"""Errors of accelerators: only more than before, only of the candidate."""

from __future__ import annotations

from datetime import timedelta

import pytest
from tests.unit.rollout.machine import NEW, NOW, OLD

from trainyard.documents.look import DeviceCounters, PodCounters, Snapshot
from trainyard.rollout.device_errors import HARDWARE_ERRORS, RELEASE_ERRORS, device_trouble

PODS = tuple(
    PodCounters(pod=f"{release}-0", release_id=release, started_at=NOW, node=node)
    for release, node in ((OLD, "old-node"), (NEW, "new-node"))
)


def counters(place: str, release: str = "", **errors: int) -> DeviceCounters:
    return DeviceCounters(
        place=place,
        release_id=release,
        errors={name.replace("__", "/"): n for name, n in errors.items()},
    )


def trouble(*looks: tuple[DeviceCounters, ...]) -> tuple[str, bool] | None:
    shots = [
        Snapshot(
            at=NOW + timedelta(seconds=30 * n),
            phase="holding",
            step_index=0,
            pods=PODS,
            route=None,
            devices=devices,
        )
        for n, devices in enumerate(looks)
    ]
    found = device_trouble(shots, candidate=NEW, stable=OLD)
    return (found.reason, found.against_release) if found else None


@pytest.mark.parametrize("kind", RELEASE_ERRORS)
def test_executions_of_the_candidate_that_fail_speak_against_it(kind: str) -> None:
    name = kind.replace("/", "__")
    found = trouble(
        (counters("new-node", NEW, **{name: 2}),), (counters("new-node", NEW, **{name: 5}),)
    )
    assert found is not None
    assert f"3 {kind.partition('/')[2]}" in found[0]
    assert found[1]


@pytest.mark.parametrize("kind", HARDWARE_ERRORS)
def test_broken_hardware_under_the_candidate_speaks_against_the_machine(kind: str) -> None:
    name = kind.replace("/", "__")
    owner = NEW if kind.startswith("execution") else ""
    found = trouble(
        (counters("new-node", owner, **{name: 0}),), (counters("new-node", owner, **{name: 1}),)
    )
    assert found is not None
    assert "new-node" in found[0]
    assert not found[1]


def test_errors_from_before_are_no_news() -> None:
    same = (counters("new-node", NEW, execution__generic=9),)
    assert trouble(same, same, same) is None


def test_absent_is_no_data_and_no_zero() -> None:
    """The exporter clears its series while nobody uses a device."""
    shown = (counters("new-node", NEW, execution__generic=9),)
    assert trouble((), (), shown) is None
    assert trouble(shown, (), shown) is None


def test_a_kind_that_appears_beside_others_was_zero() -> None:
    before = (counters("new-node", NEW, execution__generic=0),)
    after = (counters("new-node", NEW, execution__generic=0, execution__numerical=2),)
    found = trouble(before, after)
    assert found is not None
    assert "2 numerical" in found[0]


def test_counters_that_were_cleared_count_from_zero() -> None:
    before = (counters("new-node", NEW, execution__runtime=9),)
    after = (counters("new-node", NEW, execution__runtime=1),)
    found = trouble(before, after)
    assert found is not None
    assert "1 runtime" in found[0]


def test_what_stable_has_as_well_is_not_the_candidates() -> None:
    def both(n: int) -> tuple[DeviceCounters, ...]:
        return (
            counters("new-node", NEW, execution__runtime=n),
            counters("old-node", OLD, execution__runtime=n),
        )

    assert trouble(both(0), both(3)) is None


def test_broken_hardware_elsewhere_is_no_reason() -> None:
    before = (counters("old-node", ecc__mem_ecc_uncorrected=0),)
    after = (counters("old-node", ecc__mem_ecc_uncorrected=4),)
    assert trouble(before, after) is None


@pytest.mark.parametrize("kind", ["ecc__mem_ecc_corrected", "ecc__sram_ecc_corrected"])
def test_what_corrects_itself_is_no_reason(kind: str) -> None:
    assert (
        trouble((counters("new-node", **{kind: 0}),), (counters("new-node", **{kind: 50}),)) is None
    )


def test_transient_errors_are_no_reason() -> None:
    before = (counters("new-node", NEW, execution__transient=0),)
    after = (counters("new-node", NEW, execution__transient=3),)
    assert trouble(before, after) is None
