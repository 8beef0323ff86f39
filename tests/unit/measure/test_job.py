"""The measuring process measures what its job asks for, in order, and says where it is."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from trainyard.documents.measurement import LevelFigures, RateProbe
from trainyard.measure import latency
from trainyard.measure.job import Job, Outcome, measure
from trainyard.measure.latency import Load, Server
from trainyard.spec.model import Bound, LoadLevel, RateSearch, Slo

LEVELS = tuple(
    LoadLevel(
        name=name,
        max_concurrency=4,
        num_prompts=40,
        input_len=16,
        output_len=64,
        bounds={"failed_requests": Bound(max=0)},
    )
    for name in ("one", "busy")
)
SLO = Slo(ttft_ms=100)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the benchmark; rates up to 4 a second meet the SLO."""
    seen: list[Any] = []

    def run_level(level: LoadLevel, server: Server, slo: Slo | None) -> LevelFigures:
        seen.append((level.name, server.base_url, slo))
        return LevelFigures(name=level.name, figures={}, duration_s=1.0, completed=40)

    def run_probe(load: Load, server: Server, slo: Slo) -> RateProbe:
        rate = load.request_rate or 0.0
        seen.append((load.level.name, rate, load.seed))
        return RateProbe(
            rate_per_s=rate,
            requests=load.requests,
            completed=load.requests,
            attainment=1.0,
            meets=rate <= 4,
            figures={},
            duration_s=1.0,
        )

    monkeypatch.setattr(latency, "run_level", run_level)
    monkeypatch.setattr(latency, "run_probe", run_probe)
    return seen


def measured(**changes: Any) -> tuple[Outcome, list[dict[str, Any]]]:
    """Return what a job gives, and the events that it sends on the way."""
    values: dict[str, Any] = {
        "base_url": "http://127.0.0.1:8000",
        "served_model_name": "adder",
        "model_dir": "/models/adder",
        "max_model_len": 256,
        "assets_dir": "/assets",
        "tasks": (),
        "levels": LEVELS,
        **changes,
    }
    events = io.StringIO()
    outcome = measure(Job(**values), events)
    return outcome, [json.loads(line) for line in events.getvalue().splitlines()]


def test_levels_are_measured_in_their_order(asked: list[Any]) -> None:
    outcome, events = measured()

    assert asked == [
        ("one", "http://127.0.0.1:8000", None),
        ("busy", "http://127.0.0.1:8000", None),
    ]
    assert [level.name for level in outcome.latency] == ["one", "busy"]
    assert outcome.search is None
    assert [event["fraction"] for event in events] == [0.0, 0.5]


def test_the_rate_is_looked_for_with_the_prompts_of_its_level(asked: list[Any]) -> None:
    outcome, events = measured(slo=SLO, search=RateSearch(level="busy", precision=0.5))

    probes = asked[2:]
    assert asked[0][2] == SLO
    assert [name for name, _, _ in probes] == ["busy"] * len(probes)
    assert [rate for _, rate, _ in probes] == [1.0, 2.0, 4.0, 8.0, 5.657]
    assert len({seed for _, _, seed in probes}) == len(probes)
    assert outcome.search is not None
    assert (outcome.search.rate_per_s, outcome.search.failing_rate_per_s) == (4.0, 5.657)
    assert events[-1]["message"] == "latency: 5.657 requests a second"
    assert events[-1]["fraction"] == pytest.approx(2 / 3)


def test_without_an_slo_no_rate_is_looked_for(asked: list[Any]) -> None:
    outcome, _ = measured(search=RateSearch(level="busy"))

    assert outcome.search is None
    assert len(asked) == 2
