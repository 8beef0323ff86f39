"""What tests of rollouts share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.rollout.drawn import edges
from tests.unit.rollout.walk import Taken, recorded


@pytest.fixture
def only_drawn_edges() -> Iterator[None]:
    """Fail a test in which the state machine took an edge that its docstring does not draw."""
    with recorded() as taken:
        yield
    assert sorted(taken - {Taken(edge.before, edge.after, edge.event) for edge in edges()}) == []
