"""What was found out about a server's behaviour, whatever its model answers."""

from __future__ import annotations

from typing import Literal

from trainyard.documents.base import Frozen
from trainyard.spec.model import BehaviourName

Ability = Literal["exact", "tolerance", "unsupported"]
"""How a lane does something: as it should, as it should but for rounding, or not at all."""


class Capability(Frozen):
    """What a lane can do of one thing."""

    ability: Ability = "exact"
    why: str = ""
    """One or two sentences; empty for what needs no explanation."""
    source: str = ""
    """Where that is known from."""


class BehaviourCase(Frozen):
    """One thing that was tried."""

    outcome: Literal["held", "broken", "unclear"]
    """`unclear`: it could be told neither way."""
    sent: str
    came: str
    expected: str


class BehaviourRecord(Frozen):
    """One check: what was tried, and what the lane promises."""

    name: BehaviourName
    capability: Capability
    cases: tuple[BehaviourCase, ...]
    remark: str = ""
    """Figures beside the cases, such as how much came out of the prefix cache."""

    def count(self, outcome: Literal["held", "broken", "unclear"]) -> int:
        """Return how many cases ended so."""
        return sum(case.outcome == outcome for case in self.cases)

    def first(self, outcome: Literal["held", "broken", "unclear"]) -> BehaviourCase | None:
        """Return the first case that ended so."""
        return next((case for case in self.cases if case.outcome == outcome), None)


class Behaviour(Frozen):
    """All checks that were made on one start of a server."""

    near_tie: float
    """Tokens whose log-probabilities are closer than this (in nats) may change places."""
    records: tuple[BehaviourRecord, ...]
    duration_s: float
