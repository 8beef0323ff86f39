"""A candidate that never answers some of its requests has good figures for all the others."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
from tests.unit.rollout.machine import NEW, NOW, OLD

from trainyard.documents.evidence import JudgeSpec, Verdict, default_metrics, ending_metrics
from trainyard.documents.look import (
    Histogram,
    PodCounters,
    ReleaseCounters,
    RouteCounters,
    ServerCounters,
    Snapshot,
)
from trainyard.rollout.judge import judge
from trainyard.rollout.slices import blocks_from_snapshots

SLICE_S = 30.0
RATE = 8.0
PODS = 4
STEPS = ((10, 8), (25, 8), (50, 44))
"""Weights, and for how many slices."""
EDGES = (0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
SPEC = JudgeSpec(
    metrics=(*default_metrics(), *ending_metrics({})), max_duration_s=1800, last_pods=(PODS, PODS)
)


class Server:
    """A server, of which the router sees all requests, and its counters those with a token."""

    def __init__(self, name: str, release_id: str) -> None:
        self.name = name
        self.release_id = release_id
        self.times: list[float] = []
        self.sent = self.unanswered = 0

    def serve(self, requests: int, unanswered: int, rng: np.random.Generator) -> None:
        answered = requests - unanswered
        self.times += list(0.2 * np.exp(0.6 * rng.standard_normal(answered)))
        self.sent += requests
        self.unanswered += unanswered

    def counters(self) -> PodCounters:
        times = np.array(self.times)
        within = {f"{edge:g}": int((times <= edge).sum()) for edge in EDGES}
        count = len(times)
        return PodCounters(
            pod=self.name,
            release_id=self.release_id,
            started_at=NOW - timedelta(hours=2),
            ttft=Histogram(
                count=count, total=float(times.sum()), buckets={**within, "+Inf": count}
            ),
            tpot=Histogram(count=count, total=0.02 * count),
        )

    def routed(self) -> ServerCounters:
        return ServerCounters(
            ended=self.sent, errors=0, arrivals=self.sent, unanswered=self.unanswered, refused=0
        )


def snapshot(servers: list[Server], weight: int, seconds: float) -> Snapshot:
    mine = {name: [one for one in servers if one.release_id == name] for name in (OLD, NEW)}
    releases = {
        name: ReleaseCounters(
            arrivals=sum(one.sent for one in each),
            errors=0,
            in_flight=0,
            servers={one.name: one.routed() for one in each},
        )
        for name, each in mine.items()
    }
    return Snapshot(
        at=NOW + timedelta(seconds=seconds),
        phase="holding",
        step_index=0,
        pods=tuple(one.counters() for one in servers),
        route=RouteCounters(epoch="1", weights={OLD: 100 - weight, NEW: weight}, releases=releases),
    )


def decided(hanging: float, everywhere: float = 0.0) -> Verdict:
    """Return the first verdict that decides.

    Args:
        hanging: share of the candidate's requests that hang until their clients leave.
        everywhere: share of all requests whose clients leave for reasons of their own.
    """
    rng = np.random.default_rng(7)
    servers = [Server(f"{name}-{number}", name) for name in (OLD, NEW) for number in range(PODS)]
    for server in servers[:PODS]:
        server.serve(1000, 0, rng)
    shots, seconds = [snapshot(servers, STEPS[0][0], 0.0)], 0.0
    for weight, slices in STEPS:
        shots.append(snapshot(servers, weight, seconds + 0.001))
        for _ in range(slices):
            for server in servers:
                share = weight if server.release_id == NEW else 100 - weight
                requests = int(rng.poisson(RATE * SLICE_S * share / 100 / PODS))
                left = everywhere + (hanging if server.release_id == NEW else 0.0)
                server.serve(requests, int(rng.binomial(requests, left)), rng)
            seconds += SLICE_S
            shots.append(snapshot(servers, weight, seconds))
            rows = blocks_from_snapshots(shots, exposed_since=NOW, candidate=NEW, stable=OLD)
            verdict = judge(rows, SPEC)
            if verdict.outcome != "UNDECIDED":
                return verdict
    return verdict


@pytest.mark.parametrize(
    ("hanging", "minutes"), [(0.05, 14), (0.3, 4), (0.8, 3), (1.0, 3)], ids=lambda value: f"{value}"
)
def test_it_is_harm_within_minutes(hanging: float, minutes: float) -> None:
    found = decided(hanging)
    assert found.outcome == "HARM"
    assert found.reason.startswith("Harm: unanswered ")
    assert found.at <= 60 * minutes


def test_clients_that_leave_both_releases_alike_say_nothing_against_it() -> None:
    assert decided(0.0, everywhere=0.1).outcome == "NON_INFERIOR"


@pytest.mark.parametrize("hanging", [0.2, 0.3, 0.8])
def test_it_is_held_where_the_router_takes_the_head_of_a_stream_for_an_answer(
    hanging: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Envoy cannot tell such requests from answers, but servers count no first token of them."""
    monkeypatch.setattr(Server, "routed", lambda self: ServerCounters(ended=self.sent, errors=0))
    found = decided(hanging)
    assert found.outcome == "UNDECIDED"
    assert "no first token" in found.reason
