"""The step stores a verdict once, with what goes beside it, and then says yes or no."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.unit.yard import FIGURES, Yard, measurement, plan, spec

from trainyard.canonical import short
from trainyard.documents.measurement import GateVerdict, LevelFigures, Measurement, TaskScore
from trainyard.documents.parity import Samples, TaskSamples
from trainyard.documents.plan import GateName
from trainyard.errors import BadInput, Busy, CorruptFile, NotFound, Refused
from trainyard.gates import verdict as verdicts
from trainyard.steps.context import StepContext
from trainyard.steps.gate import gate, read_inputs
from trainyard.store.documents import create_document, read_document, substance
from trainyard.store.layout import samples_key

KEY = "verdicts/adder-plan/cpu/accuracy.json"
EXPECTATIONS = "verdicts/adder-plan/cpu/accuracy.expectations.json"
REPORT = "reports/adder-plan/cpu/accuracy.html"


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    return Yard(tmp_path)


def stored(yard: Yard, key: str = KEY) -> GateVerdict:
    return read_document(yard.store, key, GateVerdict)


def contents(yard: Yard) -> dict[str, bytes]:
    return {entry.key: yard.store.read(entry.key).data for entry in yard.store.list("")}


@pytest.mark.parametrize("name", ["accuracy", "latency"])
def test_a_good_measurement_passes(name: GateName, yard: Yard) -> None:
    yard.keep(measurement())

    result = gate(plan(), "cpu", name, yard.context)

    verdict = stored(yard, result.key)
    assert result.key == f"verdicts/adder-plan/cpu/{name}.json"
    assert (result.reused, verdict.outcome, verdict.gate) == (False, "pass", name)
    assert result.message == verdict.summary
    assert result.detail["outcome"] == "pass"
    assert verdict.provenance.inputs == ("measurements/candidate.json",)


def test_what_decided_is_stored_beside_the_verdict(yard: Yard) -> None:
    yard.keep(measurement())

    gate(plan(), "cpu", "accuracy", yard.context)

    result = json.loads(yard.store.read(EXPECTATIONS).data)
    assert (result["suite_name"], result["success"]) == ("accuracy", True)
    page = yard.store.read(REPORT).data.decode()
    assert stored(yard).summary.replace(">", "&gt;") in page


def test_a_bad_measurement_is_stored_and_then_refused(yard: Yard) -> None:
    yard.keep(measurement(score=0.4))

    with pytest.raises(Refused, match=r"sums exact_match is 0\.4 \(>= 0\.9 is needed\)") as refused:
        gate(plan(), "cpu", "accuracy", yard.context)

    assert refused.value.exit_code == 20
    assert KEY in refused.value.hint
    assert stored(yard).outcome == "fail"
    assert {KEY, EXPECTATIONS, REPORT} < set(contents(yard))


@pytest.mark.parametrize("score", [0.97, 0.4])
def test_a_second_run_finds_the_verdict_and_ends_the_same_way(score: float, yard: Yard) -> None:
    yard.keep(measurement(score=score))
    endings = []
    kept = []
    for _ in range(2):
        try:
            endings.append(gate(plan(), "cpu", "accuracy", yard.context).message)
        except Refused as refused:
            endings.append(refused.message)
        kept.append(contents(yard))

    assert endings[0] == endings[1]
    assert kept[0] == kept[1]


def test_a_second_run_does_not_judge_again(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    yard.keep(measurement())
    gate(plan(), "cpu", "accuracy", yard.context)

    def judged_again(*_: object) -> None:
        pytest.fail("The verdict is stored.")

    monkeypatch.setattr(verdicts, "evaluate", judged_again)

    assert gate(plan(), "cpu", "accuracy", yard.context).reused


@pytest.mark.parametrize("lost", [EXPECTATIONS, REPORT])
def test_a_run_that_was_killed_after_the_verdict_is_completed(lost: str, yard: Yard) -> None:
    yard.keep(measurement())
    gate(plan(), "cpu", "accuracy", yard.context)
    before = contents(yard)
    yard.store.delete(lost)

    result = gate(plan(), "cpu", "accuracy", yard.context)

    assert result.reused
    assert contents(yard) == before


def test_no_measurement_is_no_verdict(yard: Yard) -> None:
    with pytest.raises(NotFound, match="no measurement candidate of target cpu") as missing:
        gate(plan(), "cpu", "accuracy", yard.context)

    assert "measure" in missing.value.hint
    assert contents(yard) == {}


def test_an_unknown_target_is_named_with_those_that_exist(yard: Yard) -> None:
    with pytest.raises(BadInput, match="no target 'gpu'") as unknown:
        gate(plan(), "gpu", "accuracy", yard.context)

    assert unknown.value.hint == "Its targets: cpu."


@pytest.mark.parametrize("field", ["measurement_id", "compile_key", "serving_digest"])
def test_a_measurement_of_something_else_is_refused(field: str, yard: Yard) -> None:
    other = measurement().model_copy(update={field: "other"})
    yard.store.create("measurements/candidate.json", other.to_bytes())

    with pytest.raises(CorruptFile, match="is not the measurement of target cpu"):
        gate(plan(), "cpu", "accuracy", yard.context)


def test_the_baseline_is_of_the_first_environment_that_has_one(yard: Yard) -> None:
    yard.keep(measurement(), measurement("staged"), measurement("live"))
    asked = plan(
        environments=("canada", "staging", "production"),
        baselines={"production": "live", "staging": "staged"},
    )

    inputs = read_inputs(asked, "cpu", yard.store)

    assert inputs.baseline == measurement("staged")
    assert inputs.keys == ("measurements/candidate.json", "measurements/staged.json")


def test_a_drop_from_the_baseline_is_refused(yard: Yard) -> None:
    yard.keep(measurement(score=0.93), measurement("staged", score=0.97))
    asked = plan(environments=("staging",), baselines={"staging": "staged"})

    with pytest.raises(Refused, match=r"stable \(0\.97\) - 0\.02"):
        gate(asked, "cpu", "accuracy", yard.context)

    assert stored(yard).baseline == "staged"


def test_a_slower_release_than_the_baseline_is_refused(yard: Yard) -> None:
    slow = {**FIGURES, "ttft_p99_ms": 300.0}
    yard.keep(measurement(figures=slow), measurement("staged"))
    asked = plan(environments=("staging",), baselines={"staging": "staged"})

    with pytest.raises(
        Refused, match=r"ttft_p99_ms is 300 \(<= stable \(210\) \+ 20 % is needed\)"
    ):
        gate(asked, "cpu", "latency", yard.context)


def test_a_baseline_that_is_gone_is_not_passed_over(yard: Yard) -> None:
    yard.keep(measurement())
    asked = plan(environments=("staging",), baselines={"staging": "staged"})

    with pytest.raises(NotFound, match="no measurement staged of the stable release in staging"):
        gate(asked, "cpu", "accuracy", yard.context)


def test_who_lost_the_lock_stores_nothing(yard: Yard) -> None:
    yard.keep(measurement())

    def lost() -> None:
        raise Busy("Somebody else has the lock.")

    context = StepContext(
        yard.settings, yard.store, yard.context.progress, yard.context.work_dir, ensure_held=lost
    )
    before = contents(yard)

    with pytest.raises(Busy):
        gate(plan(), "cpu", "accuracy", context)

    assert contents(yard) == before


def keep_samples(yard: Yard, measurement_id: str, right: int, wrong: int) -> str:
    """Store samples of which the first are right, and return their key."""
    scores = {f"{number}-p-t": float(number < right) for number in range(right + wrong)}
    samples = Samples(
        measurement_id=measurement_id,
        tasks=(TaskSamples(name="sums", metric="exact_match", scores=scores),),
    )
    content = short(hashlib.sha256(substance(samples)).hexdigest())
    key = samples_key(measurement_id, content)
    create_document(yard.store, key, samples)
    return key


def test_the_samples_of_both_releases_are_compared(yard: Yard) -> None:
    own = keep_samples(yard, "candidate", 195, 5)
    others = keep_samples(yard, "stable", 195, 5)
    yard.keep(measurement(samples=own), measurement("stable", samples=others))
    asked = plan(environments=("production",), baselines={"production": "stable"})

    gate(asked, "cpu", "accuracy", yard.context)

    found = stored(yard)
    proven = found.checks[2]
    assert (proven.outcome, proven.bound) == ("pass", ">= -0.02")
    assert "200 paired samples" in proven.note
    assert {own, others} < set(found.raw_data)


def test_samples_that_are_gone_are_no_reason_to_compare_less(yard: Yard) -> None:
    yard.keep(measurement(samples="samples/candidate/0123456789ab.json"))

    with pytest.raises(NotFound, match=r"samples/candidate/0123456789ab\.json"):
        gate(plan(), "cpu", "accuracy", yard.context)

    assert not yard.store.exists(KEY)


def test_other_samples_than_the_measured_ones_are_refused(yard: Yard) -> None:
    key = keep_samples(yard, "candidate", 195, 5)
    samples = read_document(yard.store, key, Samples)
    yard.store.put(key, samples.model_copy(update={"tasks": ()}).to_bytes())
    yard.keep(measurement(samples=key))

    with pytest.raises(CorruptFile, match="does not hold the samples"):
        gate(plan(), "cpu", "accuracy", yard.context)


def test_an_adopted_stable_release_is_named(yard: Yard) -> None:
    yard.keep(measurement())
    asked = plan(environments=("production",))
    (target,) = asked.targets
    why = {"production": "The stable release of production (a) was adopted."}
    target = target.model_copy(update={"incomparable": why})

    gate(asked.model_copy(update={"targets": (target,)}), "cpu", "accuracy", yard.context)

    skipped = [check.note for check in stored(yard).checks if check.outcome == "skipped"]
    assert skipped == ["The stable release of production (a) was adopted."]


def score(**changes: Any) -> dict[str, Any]:
    base = {"name": "sums", "metric": "exact_match", "score": 0.97, "samples": 200}
    return {"accuracy": (TaskScore(**{**base, **changes}),)}


def level(**changes: Any) -> dict[str, Any]:
    base = {"name": "busy", "figures": dict(FIGURES), "duration_s": 9.0, "completed": 64}
    return {"latency": (LevelFigures(**{**base, **changes}),)}


PARITY_SPEC = spec(
    gates={
        **spec().gates.model_dump(),
        "accuracy": {
            "tasks": [{"name": "sums", "min": 0.9}],
            "parity": {"prompts": "p.jsonl", "bounds": {"agreement": {"min": 0.99}}},
        },
    }
)


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("accuracy", {"accuracy": ()}),
        ("accuracy", score(samples=0)),
        ("accuracy", score(score=math.nan)),
        ("accuracy", score(metric="acc")),
        ("latency", {"latency": ()}),
        ("latency", level(completed=0, figures=dict.fromkeys(FIGURES, 0.0))),
        ("latency", level(figures={"failed_requests": 0.0})),
        ("latency", level(figures={**FIGURES, "ttft_p99_ms": math.nan})),
    ],
    ids=[
        "no score",
        "no samples",
        "NaN score",
        "another metric",
        "no level",
        "no request",
        "half the figures",
        "NaN",
    ],
)
def test_what_was_not_measured_fails(
    name: GateName, measured: dict[str, Any], yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    # JSON has no NaN, so that no stored measurement can hold one; the gate does not rely on it.
    kept = measurement(**measured)
    monkeypatch.setattr("trainyard.steps.gate._read_measurement", lambda *words: kept)

    with pytest.raises(Refused, match="has no figure"):
        gate(plan(), "cpu", name, yard.context)

    assert stored(yard, f"verdicts/adder-plan/cpu/{name}.json").outcome == "fail"


def test_parity_that_was_asked_for_and_not_measured_fails(yard: Yard) -> None:
    yard.keep(measurement())

    with pytest.raises(Refused, match="parity: agreement has no figure"):
        gate(plan(model_spec=PARITY_SPEC), "cpu", "accuracy", yard.context)


@pytest.mark.parametrize("name", ["accuracy", "latency"])
def test_without_a_measurement_there_is_no_verdict(name: GateName, yard: Yard) -> None:
    with pytest.raises(NotFound, match="No measurement, no verdict"):
        gate(plan(), "cpu", name, yard.context)

    assert not list(yard.store.list("verdicts"))


def test_half_a_document_is_no_measurement(yard: Yard) -> None:
    whole = measurement().to_bytes()
    yard.store.put("measurements/candidate.json", whole[: len(whole) // 2])

    with pytest.raises(CorruptFile):
        gate(plan(), "cpu", "accuracy", yard.context)


def test_a_measurement_with_nan_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="latency"):
        Measurement.model_validate_json(
            measurement().model_dump_json().replace('"ttft_p99_ms":210.0', '"ttft_p99_ms":null')
        )
