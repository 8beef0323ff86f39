"""What the accuracy gate makes of the behaviour checks, and what the release carries of it."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.yard import SPEC, behaviour, case, measurement, spec

from trainyard.documents.behaviour import Capability
from trainyard.documents.measurement import Check, GateVerdict, Measurement
from trainyard.gates.verdict import derive_verdict, warnings_of

UNSUPPORTED = Capability(ability="unsupported", why="The sampler drops them.", source="a README")


def verdict(measured: Measurement, **waivers: dict[str, str]) -> GateVerdict:
    gates: Any = {**SPEC["gates"], "behaviour": {"waivers": waivers}}
    return derive_verdict(
        "accuracy",
        spec(gates=gates).gates,
        plan_id="adder-plan",
        target="cpu",
        measurement=measured,
        baseline=None,
    ).verdict


def check(found: GateVerdict, name: str) -> Check:
    (only,) = [each for each in found.checks if each.what.startswith(f"behaviour {name}:")]
    return only


def with_cases(**cases: Any) -> Measurement:
    return measurement(behaviour=behaviour(cases))


def test_a_server_that_behaves_passes_without_a_section_in_the_spec() -> None:
    assert "behaviour" not in SPEC["gates"]
    found = verdict(measurement())
    assert found.outcome == "pass"
    assert check(found, "streaming").note == "Streamed and not: 1 of 1 held."
    assert warnings_of(found) == ()


def test_a_broken_case_stops_the_release_and_says_all_there_is_to_say() -> None:
    found = verdict(with_cases(prefix_cache=(case(), case("broken"), case("broken"))))
    assert found.outcome == "fail"
    assert found.summary == (
        "The accuracy gate failed: behaviour prefix_cache: broken cases is 2 (<= 0 is needed)."
    )
    note = check(found, "prefix_cache").note
    assert "1 of 3 held" in note
    assert "Sent: a prompt. Came: 641. Expected: 640." in note
    assert "enable_prefix_caching: false" in note


@pytest.mark.parametrize(
    "measured", [measurement(behaviour=None), with_cases(streaming=())], ids=["none", "no cases"]
)
def test_what_was_not_checked_fails(measured: Measurement) -> None:
    found = verdict(measured)
    assert found.outcome == "fail"
    assert check(found, "streaming").outcome == "fail"
    assert check(found, "streaming").observed is None
    assert "was not checked" in check(found, "streaming").note


def test_a_check_that_was_recorded_twice_fails() -> None:
    once = behaviour()
    twice = once.model_copy(update={"records": (*once.records, once.records[0])})
    found = verdict(measurement(behaviour=twice))
    assert check(found, "batching").outcome == "fail"


def test_what_the_lane_does_not_support_is_a_warning_that_the_release_carries() -> None:
    measured = measurement(
        behaviour=behaviour({"penalties": (case("broken"),)}, {"penalties": UNSUPPORTED})
    )
    found = verdict(measured)
    assert found.outcome == "warn"
    (words,) = warnings_of(found)
    assert words == (
        "behaviour penalties: not supported by the lane is 1 (<= 0 is needed). The sampler drops "
        "them. (a README) 1 of 1 cases were broken."
    )


def test_a_waiver_makes_a_warning_with_its_reason() -> None:
    measured = with_cases(penalties=(case("broken"),))
    found = verdict(measured, penalties={"severity": "warning", "reason": "Nobody sends any."})
    assert found.outcome == "warn"
    (words,) = warnings_of(found)
    assert words.endswith("Only a warning by the spec: Nobody sends any.")


def test_a_check_that_is_skipped_is_shown_with_its_reason_and_carried() -> None:
    found = verdict(
        measurement(behaviour=behaviour({"penalties": ()})),
        penalties={"severity": "skip", "reason": "Nobody sends any."},
    )
    assert found.outcome == "pass"
    assert check(found, "penalties").outcome == "skipped"
    assert warnings_of(found) == (
        "behaviour penalties: broken cases. The spec skips it: Nobody sends any.",
    )


def test_a_check_that_could_tell_nothing_is_a_warning() -> None:
    found = verdict(with_cases(stop_strings=(case("unclear"),)))
    assert found.outcome == "warn"
    assert "behaviour stop_strings: cases that could tell is 0" in found.summary


def test_unclear_cases_beside_others_are_only_counted() -> None:
    found = verdict(with_cases(stop_strings=(case("unclear"), case())))
    assert found.outcome == "pass"
    assert check(found, "stop_strings").note == "Stop strings: 1 of 2 held, 1 could not be told."


def test_a_model_that_answers_badly_fails_however_well_it_behaves() -> None:
    assert verdict(measurement(score=0.1)).outcome == "fail"
