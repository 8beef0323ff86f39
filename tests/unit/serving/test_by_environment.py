"""Routers and leases of several environments."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainyard.serving.by_environment import LeaseByEnvironment, RouterByEnvironment
from trainyard.serving.protocol import LeaseSight, RouteStatus


@dataclass
class Part:
    """A router and a lease that note what they are asked."""

    name: str
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def status(self, environment: str, model: str) -> RouteStatus | None:
        self.asked.append(("status", environment, model))
        return None

    def look(self, environment: str, model: str) -> LeaseSight:
        self.asked.append(("look", environment, model))
        return LeaseSight("alive", self.name)

    def renew(self, environment: str, model: str, *, holder: str, duration_s: float) -> None:
        self.asked.append(("renew", environment, model, holder))

    def release(self, environment: str, model: str, *, holder: str) -> None:
        self.asked.append(("release", environment, model, holder))


def test_each_environment_is_asked_at_its_own_and_opened_once() -> None:
    parts: dict[str, Part] = {}
    opened: list[str] = []

    def open_part(name: str) -> Part:
        opened.append(name)
        return parts.setdefault(name, Part(name))

    router, lease = RouterByEnvironment(open_part), LeaseByEnvironment(open_part)
    assert opened == []
    router.status("staging", "adder")
    router.status("staging", "adder")
    lease.renew("production", "adder", holder="run", duration_s=120)
    lease.release("production", "adder", holder="run")
    assert lease.look("production", "adder") == LeaseSight("alive", "production")
    assert opened == ["staging", "production"]
    assert parts["staging"].asked == [("status", "staging", "adder")] * 2
    assert parts["production"].asked == [
        ("renew", "production", "adder", "run"),
        ("release", "production", "adder", "run"),
        ("look", "production", "adder"),
    ]
