"""A release and its statement say the same, and the statement is one that other tools can read."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.yard import COMPILE_KEY, MOMENT, SERVING, plan, spec

from trainyard.canonical import canonical_json, digest
from trainyard.documents.base import Provenance
from trainyard.documents.release import Attestation, Pin, Release
from trainyard.documents.statement import (
    payload_of_release,
    payload_of_verdict,
    release_of_payload,
    verdict_of_payload,
)

IMAGE = f"yard.example/serve@sha256:{'1' * 64}"
PINS = (
    Pin(name="checkpoint-manifest", key="checkpoints/adder/v1/manifest.json", sha256="a" * 64),
    Pin(name="bundle-manifest", key=f"bundles/{COMPILE_KEY}/manifest.json", sha256="b" * 64),
    Pin(name="measurement", key="measurements/m1.json", sha256="c" * 64),
    Pin(name="verdict/accuracy", key="verdicts/p/cpu/accuracy.json", sha256="d" * 64),
)


def release(**changes: Any) -> Release:
    model_spec = spec()
    values: dict[str, Any] = {
        "created_at": MOMENT,
        "provenance": Provenance(
            requested_by="ada", dag_run="manual__1", host="yard", inputs=("plans/p.json",)
        ),
        "release_id": "adder-0123456789ab",
        "model": "adder",
        "target": model_spec.targets[0],
        "lane": "cpu",
        "checkpoint_key": "checkpoints/adder/v1/manifest.json",
        "checkpoint_digest": digest("checkpoint"),
        "revision": "v1",
        "source": "file:models",
        "compile_key": COMPILE_KEY,
        "bundle_digest": digest("bundle"),
        "serving": SERVING,
        "serving_digest": digest(SERVING),
        "served_model_name": "adder",
        "image": IMAGE,
        "toolchain": {"torch": "2.9.0", "vllm": "0.32.0"},
        "measurement_id": "m1",
        "request": plan().request,
        "spec": model_spec,
        "pins": PINS,
        "builder": "https://airflow.example/",
    }
    return Release(**{**values, **changes})


def statement(of: Release) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(payload_of_release(of))
    return made


words = st.text(max_size=20)


@given(
    created_at=st.datetimes(timezones=st.just(UTC), min_value=datetime(2020, 1, 1)),
    serving=st.dictionaries(words, st.none() | st.booleans() | st.integers() | words, max_size=4),
    toolchain=st.dictionaries(words, words, max_size=4),
    who=words,
    image=words,
    pins=st.sets(st.sampled_from(PINS)),
)
def test_a_release_comes_back_as_it_was(
    created_at: datetime,
    serving: dict[str, Any],
    toolchain: dict[str, str],
    who: str,
    image: str,
    pins: set[Pin],
) -> None:
    made = release(
        created_at=created_at,
        serving=serving,
        toolchain=toolchain,
        image=image,
        provenance=Provenance(requested_by=who, image=image),
        pins=tuple(pin for pin in PINS if pin in pins),
    )

    payload = payload_of_release(made)

    assert release_of_payload(payload) == made
    assert payload_of_release(release_of_payload(payload)) == payload


def test_it_is_an_in_toto_statement_with_slsa_provenance() -> None:
    made = statement(release())

    assert made["_type"] == "https://in-toto.io/Statement/v1"
    assert made["predicateType"] == "https://slsa.dev/provenance/v1"
    assert set(made) == {"_type", "subject", "predicateType", "predicate"}
    assert [each["name"] for each in made["subject"]] == [
        "checkpoints/adder/v1",
        f"bundles/{COMPILE_KEY}",
        "releases/adder/adder-0123456789ab/serving",
    ]
    assert made["subject"][2]["digest"] == {"sha256": digest(SERVING)}


def test_the_provenance_says_from_what_by_whom_and_where() -> None:
    predicate = statement(release())["predicate"]
    definition, details = predicate["buildDefinition"], predicate["runDetails"]

    assert definition["buildType"] == "urn:trainyard:release:v1"
    assert definition["externalParameters"]["spec"] == spec().model_dump(mode="json", by_alias=True)
    assert definition["externalParameters"]["request"]["model"] == "adder"
    assert definition["externalParameters"]["requestedBy"] == "ada"
    assert definition["internalParameters"]["inputs"] == ["plans/p.json"]
    assert definition["internalParameters"]["compileKey"] == COMPILE_KEY
    by_name = {each["name"]: each for each in definition["resolvedDependencies"]}
    assert by_name["source"]["uri"] == "file:models"
    assert by_name["checkpoint-manifest"]["digest"] == {"sha256": "a" * 64}
    assert by_name["toolchain/vllm"]["annotations"] == {"version": "0.32.0"}
    assert by_name["image"] == {"name": "image", "uri": IMAGE, "digest": {"sha256": "1" * 64}}
    assert details["builder"]["id"] == "https://airflow.example/"
    assert details["metadata"]["invocationId"] == "manual__1"
    assert details["metadata"]["finishedOn"] == "2026-11-22T12:00:00Z"
    assert [each["name"] for each in details["byproducts"]] == [
        "bundle-manifest",
        "measurement",
        "verdict/accuracy",
    ]


def test_every_resource_has_a_name_and_a_uri_or_digest() -> None:
    predicate = statement(release())["predicate"]
    resources = [
        *predicate["buildDefinition"]["resolvedDependencies"],
        *predicate["runDetails"]["byproducts"],
    ]

    assert all(each["name"] and {"uri", "digest"} & set(each) for each in resources)


def test_fields_that_a_later_version_adds_are_ignored() -> None:
    made = statement(release())
    made["predicate"]["runDetails"]["metadata"]["later"] = 1
    made["subject"][0]["later"] = "x"

    assert release_of_payload(canonical_json(made)) == release()


def drop_a_subject(made: dict[str, Any]) -> None:
    made["subject"].pop()


def name_another_subject(made: dict[str, Any]) -> None:
    made["subject"][0]["name"] = "checkpoints/adder/v2"


def take_another_digest(made: dict[str, Any]) -> None:
    made["subject"][0]["digest"]["sha256"] = "0" * 64


def name_another_predicate(made: dict[str, Any]) -> None:
    made["predicateType"] = "https://example.com/other"


def name_another_build(made: dict[str, Any]) -> None:
    made["predicate"]["buildDefinition"]["buildType"] = "urn:other"


def name_another_release(made: dict[str, Any]) -> None:
    made["predicate"]["buildDefinition"]["internalParameters"]["releaseId"] = "adder-ffffffffffff"


@pytest.mark.parametrize(
    "change",
    [
        drop_a_subject,
        name_another_subject,
        take_another_digest,
        name_another_predicate,
        name_another_build,
        name_another_release,
    ],
)
def test_a_statement_that_contradicts_itself_is_none(
    change: Callable[[dict[str, Any]], None],
) -> None:
    made = statement(release())
    change(made)

    with pytest.raises(ValueError, match=r"contradict|not about 3|literal_error|Input should be"):
        release_of_payload(canonical_json(made))


def verdict(outcome: str = "warn") -> Attestation:
    return Attestation(
        created_at=MOMENT,
        release_id="adder-0123456789ab",
        kind="verdict",
        subject={"gate": "latency", "outcome": outcome, "plan_id": "p", "digest": "e" * 64},
    )


@pytest.mark.parametrize(
    ("outcome", "result"), [("pass", "PASSED"), ("warn", "WARNED"), ("fail", "FAILED")]
)
def test_a_verdict_is_a_test_result_about_the_release(outcome: str, result: str) -> None:
    payload = payload_of_verdict(verdict(outcome), release())

    made = json.loads(payload)
    assert made["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert made["predicate"]["result"] == result
    assert made["subject"] == statement(release())["subject"]
    assert made["predicate"]["configuration"] == [{"name": "plan", "uri": "plans/p.json"}]
    assert verdict_of_payload(payload) == verdict(outcome)


def test_a_verdict_that_contradicts_its_result_is_none() -> None:
    made = json.loads(payload_of_verdict(verdict("fail"), release()))
    made["predicate"]["result"] = "PASSED"

    with pytest.raises(ValueError, match="contradict"):
        verdict_of_payload(canonical_json(made))


def test_neither_is_taken_for_the_other() -> None:
    with pytest.raises(ValueError, match="predicate"):
        release_of_payload(payload_of_verdict(verdict(), release()))
    with pytest.raises(ValueError, match="predicate"):
        verdict_of_payload(payload_of_release(release()))
