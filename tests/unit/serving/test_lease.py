"""Leases in files: alive, expired, absent, on two clocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainyard.serving.lease import FileLease, LeaseRecord, LeaseState, lease_state
from trainyard.serving.protocol import LeaseSight
from trainyard.serving.records import ServingPaths
from trainyard.settings import Settings


class Clocks:
    wall = 1_000_000.0
    monotonic = 500.0

    def pass_s(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def lease(tmp_path: Path, clocks: Clocks) -> FileLease:
    return FileLease(
        Settings(home=tmp_path), wall=lambda: clocks.wall, monotonic=lambda: clocks.monotonic
    )


def test_a_lease_lives_as_long_as_it_was_given(lease: FileLease, clocks: Clocks) -> None:
    assert lease.state("staging", "adder") == "absent"
    lease.renew("staging", "adder", holder="run 1", duration_s=120)
    clocks.pass_s(119.9)
    assert lease.state("staging", "adder") == "alive"
    clocks.pass_s(0.2)
    assert lease.state("staging", "adder") == "expired"
    lease.renew("staging", "adder", holder="run 1", duration_s=120)
    assert lease.state("staging", "adder") == "alive"


def test_a_look_tells_who_holds_it_and_whether_it_was_renewed(
    lease: FileLease, clocks: Clocks
) -> None:
    assert lease.look("staging", "adder") == LeaseSight("absent")
    lease.renew("staging", "adder", holder="run#1", duration_s=120)
    first = lease.look("staging", "adder")
    assert (first.state, first.holder, first.left_s) == ("alive", "run#1", 120.0)
    clocks.pass_s(1)
    assert lease.look("staging", "adder") == first
    assert lease.look("staging", "adder").left_s == 119.0
    lease.renew("staging", "adder", holder="run#1", duration_s=120)
    assert lease.look("staging", "adder").mark != first.mark
    clocks.pass_s(121)
    assert lease.look("staging", "adder").state == "expired"


def test_channels_have_leases_of_their_own(lease: FileLease) -> None:
    lease.renew("a", "b--c", holder="run", duration_s=120)
    assert lease.state("a", "b--c") == "alive"
    assert lease.state("a--b", "c") == "absent"


def test_only_its_holder_ends_a_lease(lease: FileLease) -> None:
    lease.renew("staging", "adder", holder="run 2", duration_s=120)
    lease.release("staging", "adder", holder="run 1")
    assert lease.state("staging", "adder") == "alive"
    lease.release("staging", "adder", holder="run 2")
    assert lease.state("staging", "adder") == "absent"
    lease.release("staging", "adder", holder="run 2")


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_setting_the_wall_clock_changes_nothing(
    lease: FileLease, clocks: Clocks, jump_s: float
) -> None:
    lease.renew("staging", "adder", holder="run", duration_s=120)
    clocks.wall += jump_s
    assert lease.state("staging", "adder") == "alive"
    clocks.pass_s(121)
    assert lease.state("staging", "adder") == "expired"


RECORD = LeaseRecord(
    holder="run", duration_s=120, ends_wall=1120, ends_monotonic=620, boot_id="before"
)


@pytest.mark.parametrize(
    ("wall", "monotonic", "boot", "state"),
    [
        (1100, 5, "after", "alive"),
        (1121, 5, "after", "expired"),
        (900, 5, "after", "expired"),
        (5000, 619, "before", "alive"),
        (1100, 621, "before", "expired"),
    ],
)
def test_after_a_restart_of_the_machine_the_wall_clock_decides(
    wall: float, monotonic: float, boot: str, state: LeaseState
) -> None:
    assert lease_state(RECORD, wall=wall, monotonic=monotonic, boot=boot) == state


def test_a_lease_that_cannot_be_read_is_none(tmp_path: Path, lease: FileLease) -> None:
    path = ServingPaths.of(Settings(home=tmp_path)).lease("staging", "adder")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert lease.state("staging", "adder") == "absent"


def test_its_age_counts_from_the_last_renewal(lease: FileLease, clocks: Clocks) -> None:
    assert lease.age_s("staging", "adder") is None
    lease.renew("staging", "adder", holder="run 1", duration_s=120)
    clocks.pass_s(30)
    assert lease.age_s("staging", "adder") == pytest.approx(30)


def test_who_may_not_write_the_lease_is_told(
    lease: FileLease, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lease.look("staging", "adder").may_renew
    lease.renew("staging", "adder", holder="run 1", duration_s=120)
    assert lease.look("staging", "adder").may_renew
    monkeypatch.setattr("os.access", lambda *_: False)
    sight = lease.look("staging", "adder")
    assert (sight.state, sight.may_renew) == ("alive", False)
