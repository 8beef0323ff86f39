"""Tokens cost what the instance costs, at the load that the SLO allows."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.yard import FIGURES, SPEC, measurement

from trainyard.documents.measurement import LevelFigures, Measurement, RateFound, RateProbe
from trainyard.documents.plan import Price
from trainyard.gates.cost import cost_expectations, cost_of
from trainyard.gates.expectations import evaluate
from trainyard.gates.verdict import derive_verdict
from trainyard.spec.model import Gates

PRICE = Price(instance="trn1.32xlarge", usd_per_hour=7.2, source="a test of today")
BOUNDS = {"usd_per_million_output_tokens": {"max": 5}}


def gates(cost: dict[str, Any] | None = None, **slo: Any) -> Gates:
    latency = {**SPEC["gates"]["latency"], "slo": {"ttft_ms": 400, **slo}}
    cost = {"bounds": BOUNDS, **(cost or {})}
    return Gates.model_validate({**SPEC["gates"], "latency": latency, "cost": cost})


def level(name: str, prompt: float, answer: float, attainment: float = 1.0) -> LevelFigures:
    figures = {
        **FIGURES,
        "input_tokens_per_s": prompt,
        "output_tokens_per_s": answer,
        "slo_attainment": attainment,
    }
    return LevelFigures(name=name, figures=figures, duration_s=9.0, completed=64)


def measured(*levels: LevelFigures, search: RateFound | None = None) -> Measurement:
    return measurement(latency=levels, search=search)


def found(rate: float | None, prompt: float = 0.0, answer: float = 0.0) -> RateFound:
    probe = RateProbe(
        rate_per_s=rate or 1.0,
        requests=20,
        completed=20,
        attainment=1.0,
        meets=rate is not None,
        figures={"input_tokens_per_s": prompt, "output_tokens_per_s": answer},
        duration_s=10.0,
    )
    return RateFound(
        level="busy",
        rate_per_s=rate,
        failing_rate_per_s=None,
        complete=True,
        reason="",
        probes=(probe,),
    )


def test_the_price_is_shared_among_the_tokens_by_their_weight() -> None:
    # 7.2 dollars an hour are 0.002 a second, for 600 + 4 * 100 shares.
    cost = cost_of(measured(level("busy", 600, 100)), gates(), PRICE)

    assert cost is not None
    assert cost.input_usd == pytest.approx(2.0)
    assert cost.output_usd == pytest.approx(8.0)
    paid = (600 * cost.input_usd + 100 * cost.output_usd) / 1e6 * 3600
    assert paid == pytest.approx(PRICE.usd_per_hour)


def test_replicas_share_an_instance() -> None:
    alone = cost_of(measured(level("busy", 600, 100)), gates(), PRICE)
    shared = cost_of(measured(level("busy", 600, 100)), gates({"replicas_per_instance": 4}), PRICE)

    assert alone is not None
    assert shared is not None
    assert shared.output_usd == pytest.approx(alone.output_usd / 4)


def test_the_busiest_level_that_meets_the_slo_counts() -> None:
    levels = (level("one", 60, 10), level("busy", 600, 100, 0.99), level("full", 900, 150, 0.98))

    cost = cost_of(measured(*levels), gates(), PRICE)

    assert cost is not None
    assert cost.throughput.at == "level busy"


def test_the_rate_that_was_found_counts_before_any_level() -> None:
    busy = level("busy", 600, 100)

    cost = cost_of(measured(busy, search=found(12.5, 1200, 200)), gates(), PRICE)

    assert cost is not None
    assert cost.throughput.at == "12.5 requests a second"
    assert cost.input_usd == pytest.approx(1.0)
    assert cost_of(measured(busy, search=found(None)), gates(), PRICE) is None


def test_without_price_or_slo_there_is_no_cost() -> None:
    busy = measured(level("busy", 600, 100))
    without = Gates.model_validate(SPEC["gates"])

    assert cost_of(busy, gates(), None) is None
    assert cost_of(busy, without, PRICE) is None
    assert cost_expectations(without, busy, PRICE) == ()


@pytest.mark.parametrize(("limit", "outcome"), [(8.5, "pass"), (5, "fail")])
def test_a_gate_may_bound_it(limit: float, outcome: str) -> None:
    bounded = gates({"bounds": {"usd_per_million_output_tokens": {"max": limit}}})

    (check,) = evaluate(
        "latency", cost_expectations(bounded, measured(level("busy", 600, 100)), PRICE)
    ).checks

    assert check.outcome == outcome
    assert check.note == (
        "7.2 dollars an hour (a test of today), 600 input and 100 output tokens a second at level "
        "busy."
    )


@pytest.mark.parametrize(
    ("measurement_", "price", "note"),
    [
        (measured(level("busy", 600, 100)), None, "Nobody said what an hour of the instance"),
        (measured(level("busy", 600, 100, 0.5)), PRICE, "No measured load met the SLO."),
        (measured(level("busy", 0.0, 100)), PRICE, "No measured load met the SLO."),
        (measured(), PRICE, "No measured load met the SLO."),
    ],
)
def test_a_cost_that_is_not_known_fails_its_bound(
    measurement_: Measurement, price: Price | None, note: str
) -> None:
    (check,) = evaluate("latency", cost_expectations(gates(), measurement_, price)).checks

    assert (check.outcome, check.observed) == ("fail", None)
    assert check.note.startswith(note)


def test_the_latency_gate_looks_at_the_cost() -> None:
    derived = derive_verdict(
        "latency",
        gates(),
        plan_id="adder-plan",
        target="cpu",
        measurement=measured(level("busy", 600, 100)),
        baseline=None,
        price=PRICE,
    )

    assert derived.verdict.outcome == "fail"
    assert "cost: usd_per_million_output_tokens is 8 (<= 5 is needed)" in derived.verdict.summary
