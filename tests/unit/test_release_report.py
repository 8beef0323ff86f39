"""The report is read from what the store has, and says what it has not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.yard import FIGURES, SPEC, Yard, measurement, plan, spec

from trainyard.documents.measurement import LevelFigures
from trainyard.documents.plan import Plan, Price
from trainyard.errors import BadInput, NotFound
from trainyard.release_report import find_release, read_release_report
from trainyard.steps.gate import gate
from trainyard.steps.publish import publish

PRICE = Price(instance="local", usd_per_hour=7.2, source="a test")
PRICED = {
    **SPEC["gates"],
    "latency": {**SPEC["gates"]["latency"], "slo": {"ttft_ms": 400}},
}


def priced_plan(price: Price | None = PRICE) -> Plan:
    made = plan(
        model_spec=spec(gates=PRICED),
        environments=("production",),
        baselines={"production": "stable"},
    )
    (target,) = made.targets
    return made.model_copy(update={"targets": (target.model_copy(update={"price": price}),)})


def publish_all(yard: Yard, made: Plan) -> str:
    """Publish a release and return its id."""
    tokens = {"input_tokens_per_s": 600.0, "output_tokens_per_s": 100.0, "slo_attainment": 1.0}
    level = LevelFigures(name="busy", figures={**FIGURES, **tokens}, duration_s=9.0, completed=64)
    yard.keep_artifacts()
    yard.keep(measurement(latency=(level,)), measurement("stable", score=0.96))
    yard.keep_plan(made)
    for name in ("accuracy", "latency"):
        gate(made, "cpu", name, yard.context)  # type: ignore[arg-type]
    return str(publish(made, "cpu", yard.context).detail["release_id"])


def test_it_holds_all_that_is_known_of_a_release(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    release_id = publish_all(yard, priced_plan())

    found = read_release_report(yard.store, "adder", release_id, yard.settings)

    # So few samples do not prove that it is no worse than stable.
    assert (found.problem, found.lost, found.outcome) == ("", (), "warn")
    assert [verdict.gate for verdict in found.verdicts] == ["accuracy", "latency"]
    assert found.measurement is not None
    assert found.measurement.measurement_id == "candidate"
    assert found.baseline is not None
    assert found.baseline.measurement_id == "stable"
    (line,) = found.targets
    assert (line.target, line.release_id, line.price) == ("cpu", release_id, PRICE)
    assert line.cost is not None
    assert line.cost.output_usd == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (priced_plan(price=None), "Nobody said what an hour of local costs."),
        (plan(), "The spec has no SLO to price tokens at."),
    ],
)
def test_a_cost_that_is_not_known_has_its_reason(tmp_path: Path, made: Plan, why: str) -> None:
    yard = Yard(tmp_path)
    release_id = publish_all(yard, made)

    (line,) = read_release_report(yard.store, "adder", release_id, yard.settings).targets

    assert (line.cost, line.why_none) == (None, why)


def test_what_is_gone_is_named_and_left_out(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    release_id = publish_all(yard, priced_plan())
    for key in ("measurements/candidate.json", "plans/adder-plan.json"):
        yard.store.delete(key)

    found = read_release_report(yard.store, "adder", release_id, yard.settings)

    assert (found.measurement, found.targets) == (None, ())
    assert found.lost == ("measurements/candidate.json",)
    assert len(found.verdicts) == 2


def test_a_signature_that_does_not_count_is_told(tmp_path: Path) -> None:
    yard = Yard(tmp_path / "here")
    release_id = publish_all(yard, priced_plan())
    stranger = Yard(tmp_path / "elsewhere")

    found = read_release_report(yard.store, "adder", release_id, stranger.settings)

    assert found.problem


def test_a_release_is_found_by_its_id_or_as_a_models_latest(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    release_id = publish_all(yard, priced_plan())

    assert find_release(yard.store, release_id) == ("adder", release_id)
    assert find_release(yard.store, "adder") == ("adder", release_id)
    with pytest.raises(NotFound):
        find_release(yard.store, "nothing")
    with pytest.raises(BadInput):
        find_release(yard.store, "No/Such")
