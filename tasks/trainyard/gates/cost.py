"""What tokens cost, and what the spec allows them to cost.

An hour of the instance is paid whatever it serves. At the load that the SLO allows, the price is
shared among the tokens that go in and come out, an output token counting `output_weight` times as
much as an input token:

    input = price / (replicas * 3600 * (input tokens/s + weight * output tokens/s))
    output = weight * input
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trainyard.documents.measurement import Measurement
from trainyard.documents.plan import Price
from trainyard.gates.expectations import Expectation
from trainyard.gates.words import number
from trainyard.spec.model import Bound, CostGate, Gates, Slo

DEFAULT_OUTPUT_WEIGHT: float = CostGate.model_fields["output_weight"].default
_MILLION = 1e6


@dataclass(frozen=True)
class Throughput:
    """Tokens a second of one replica at a load that meets the SLO."""

    input_tokens_per_s: float
    output_tokens_per_s: float
    at: str
    """Which load, in words."""


@dataclass(frozen=True)
class Cost:
    """What a million tokens cost, in US dollars."""

    input_usd: float
    output_usd: float
    throughput: Throughput
    usd_per_hour: float
    """Of one replica."""
    price_source: str
    output_weight: float


def throughput_within_slo(measurement: Measurement, slo: Slo) -> Throughput | None:
    """Return the tokens a second at the busiest measured load that met the SLO; None if none did.

    That is the rate that was searched, if it was; else the level with the most output tokens.
    """
    loads: list[tuple[str, Mapping[str, float]]] = []
    if measurement.search is not None:
        best = measurement.search.best
        if best is not None:
            loads.append((f"{number(best.rate_per_s)} requests a second", best.figures))
    else:
        loads += [
            (f"level {level.name}", level.figures)
            for level in measurement.latency
            if level.completed and level.figures.get("slo_attainment", 0.0) >= slo.attainment
        ]
    found = [
        Throughput(figures["input_tokens_per_s"], figures["output_tokens_per_s"], at)
        for at, figures in loads
        if _positive(figures, "input_tokens_per_s") and _positive(figures, "output_tokens_per_s")
    ]
    return max(found, key=lambda each: each.output_tokens_per_s, default=None)


def _positive(figures: Mapping[str, float], name: str) -> bool:
    value = figures.get(name, 0.0)
    return math.isfinite(value) and value > 0


def cost_of(measurement: Measurement, gates: Gates, price: Price | None) -> Cost | None:
    """Return what tokens cost; None without price, without SLO, or if no load met it."""
    slo, gate = gates.latency.slo, gates.cost
    if price is None or slo is None:
        return None
    served = throughput_within_slo(measurement, slo)
    if served is None:
        return None
    weight = gate.output_weight if gate else DEFAULT_OUTPUT_WEIGHT
    usd_per_hour = price.usd_per_hour / (gate.replicas_per_instance if gate else 1)
    shares_per_s = served.input_tokens_per_s + weight * served.output_tokens_per_s
    input_usd = usd_per_hour / 3600 / shares_per_s * _MILLION
    return Cost(
        input_usd=input_usd,
        output_usd=weight * input_usd,
        throughput=served,
        usd_per_hour=usd_per_hour,
        price_source=price.source,
        output_weight=weight,
    )


def cost_expectations(
    gates: Gates, measurement: Measurement, price: Price | None
) -> tuple[Expectation, ...]:
    """Return what the spec expects of the price of tokens; nothing if it has no bounds on it."""
    return () if gates.cost is None else tuple(_expectations(gates, gates.cost, measurement, price))


def _expectations(
    gates: Gates, gate: CostGate, measurement: Measurement, price: Price | None
) -> Iterator[Expectation]:
    cost = cost_of(measurement, gates, price)
    figures = {} if cost is None else {
        "usd_per_million_input_tokens": cost.input_usd,
        "usd_per_million_output_tokens": cost.output_usd,
    }  # fmt: skip
    note = _note(cost, price)
    for metric, bound in gate.bounds.items():
        yield Expectation(
            f"cost/{metric}",
            f"cost: {metric}",
            figures.get(metric),
            _words(bound),
            minimum=bound.min,
            maximum=bound.max,
            severity=bound.severity,
            note=note,
        )


def _words(bound: Bound) -> str:
    limits = ((">=", bound.min), ("<=", bound.max))
    return " and ".join(f"{sign} {number(limit)}" for sign, limit in limits if limit is not None)


def _note(cost: Cost | None, price: Price | None) -> str:
    if price is None:
        return "Nobody said what an hour of the instance costs."
    if cost is None:
        return "No measured load met the SLO."
    return (
        f"{number(cost.usd_per_hour)} dollars an hour ({cost.price_source}), "
        f"{cost.throughput.input_tokens_per_s:.0f} input and "
        f"{cost.throughput.output_tokens_per_s:.0f} output tokens a second at {cost.throughput.at}."
    )
