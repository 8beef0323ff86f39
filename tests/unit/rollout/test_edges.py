"""The docstring of the state machine draws every edge that it takes, and no other one."""

from __future__ import annotations

from typing import get_args

import pytest
from tests.unit.rollout.drawn import edges, events_without_edges
from tests.unit.rollout.walk import PLANS, Taken, recorded, starts, walk

from trainyard.documents.channel import Phase
from trainyard.rollout.events import Event

DRAWN = {Taken(edge.before, edge.after, edge.event) for edge in edges()}
EVENTS = {kind.__name__ for kind in get_args(Event)}


@pytest.fixture(scope="module")
def taken() -> set[Taken]:
    """Every edge that the walk takes."""
    with recorded() as found:
        for name, channel in starts().items():
            assert walk(channel, PLANS[name]) > 100
    return found


def test_every_edge_that_is_taken_is_drawn(taken: set[Taken]) -> None:
    assert sorted(taken - DRAWN) == []


def test_every_edge_that_is_drawn_is_taken(taken: set[Taken]) -> None:
    assert sorted(DRAWN - taken) == []


def test_every_state_is_drawn() -> None:
    states = set(get_args(Phase))
    assert {edge.before for edge in DRAWN} == states
    assert {edge.after for edge in DRAWN} == states


def test_every_event_is_named_once_with_its_edges_or_without() -> None:
    without = events_without_edges()
    with_edges = {edge.event for edge in DRAWN}
    assert sorted([*with_edges, *without]) == sorted(EVENTS)


def test_every_edge_says_why() -> None:
    assert [edge for edge in edges() if not edge.why] == []
