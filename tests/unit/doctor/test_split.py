"""A binomial test of arrivals, and the probe in front of it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from trainyard.doctor.report import Check
from trainyard.doctor.split import CHANCE, judge_split, split_checks
from trainyard.serving.protocol import ReleaseTraffic, RouteStatus
from trainyard.serving.relay import TRACK_HEADER


@dataclass
class FakeGateway:
    """Splits as told, or not."""

    weights: dict[str, int]
    real: dict[str, int] | None = None
    """How it really splits; None: by its weights."""
    follows_header: bool = True
    lost: int = 0
    """Requests that arrive elsewhere."""
    broken: int = 0
    """Requests of a batch that get no answer."""
    arrived: dict[str, int] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def look(self) -> RouteStatus:
        return RouteStatus(
            epoch="one",
            weights=dict(self.weights),
            traffic={
                name: ReleaseTraffic(self.arrived.get(name, 0), 0, 0) for name in self.weights
            },
            guard="following",
            guard_reason="",
            channel_generation=1,
        )

    def send(self, count: int, headers: Mapping[str, str]) -> int:
        real = self.real or self.weights
        for _ in range(count - self.lost):
            pinned = headers.get(TRACK_HEADER) and self.follows_header
            name = "old" if pinned else self.random.choices([*real], [*real.values()])[0]
            self.arrived[name] = self.arrived.get(name, 0) + 1
        return count - self.broken


def states(gateway: FakeGateway) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for check in split_checks(gateway.look, gateway.send, stable="old", requests=500):
        found.setdefault(check.name, set()).add(check.state)
    return found


WEIGHTS = {"old": 90, "new": 10}


def test_a_gateway_that_follows_its_weights_passes() -> None:
    found = states(FakeGateway(WEIGHTS))
    assert found == {
        "traffic: answers": {"ok"}, "traffic: split": {"ok"}, "traffic: pins": {"ok"},
    }  # fmt: skip


@pytest.mark.parametrize("real", [{"old": 50, "new": 50}, {"old": 100, "new": 0}])
def test_one_that_ignores_them_fails(real: dict[str, int]) -> None:
    assert "fail" in states(FakeGateway(WEIGHTS, real))["traffic: split"]


def test_one_that_ignores_the_header_fails() -> None:
    found = states(FakeGateway({"old": 50, "new": 50}, follows_header=False))
    assert found["traffic: split"] == {"ok"}
    assert found["traffic: pins"] == {"fail"}


def test_requests_that_arrive_elsewhere_or_get_no_answer_fail() -> None:
    assert "fail" in states(FakeGateway(WEIGHTS, lost=400))["traffic: split"]
    assert states(FakeGateway(WEIGHTS, broken=3))["traffic: answers"] == {"fail"}


def test_a_route_of_which_nothing_is_known_is_a_warning() -> None:
    (check,) = split_checks(lambda: None, lambda count, headers: count, stable="old")
    assert check.state == "warn"


def test_a_route_that_changes_meanwhile_is_not_judged() -> None:
    gateway = FakeGateway(WEIGHTS)

    def send(count: int, headers: Mapping[str, str]) -> int:
        gateway.weights = {"old": 50, "new": 50}
        return count

    (check,) = split_checks(gateway.look, send, stable="old")
    assert (check.state, check.remedy) == ("warn", "Try again.")


def test_a_right_split_is_hardly_ever_called_wrong() -> None:
    dice = random.Random(11)
    wrong = 0
    for _ in range(400):
        new = sum(dice.random() < 0.1 for _ in range(500))
        checks: list[Check] = [*judge_split({"old": 500 - new, "new": new}, WEIGHTS, at_least=500)]
        wrong += any(check.state == "fail" for check in checks)
    assert wrong <= 1, f"at a chance of {CHANCE}"
