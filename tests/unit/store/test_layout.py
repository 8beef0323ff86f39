from __future__ import annotations

from collections.abc import Callable

import pytest

from trainyard.errors import BadInput
from trainyard.names import check_relative_path
from trainyard.store import layout

RELEASE = "adder-0123456789ab"
DIGEST = "0" * 64

KEYS = [
    (layout.plan_key("p1"), "plans/p1.json"),
    (layout.checkpoint_prefix("adder", "v1.0"), "checkpoints/adder/v1.0"),
    (layout.checkpoint_manifest_key("adder", "v1"), "checkpoints/adder/v1/manifest.json"),
    (layout.bundle_prefix(DIGEST), f"bundles/{DIGEST}"),
    (layout.bundle_manifest_key(DIGEST), f"bundles/{DIGEST}/manifest.json"),
    (layout.measurement_key("m1"), "measurements/m1.json"),
    (layout.samples_key("m1", "0a1b"), "samples/m1/0a1b.json"),
    (layout.reference_key(DIGEST, "0a1b"), f"references/{DIGEST}/0a1b.json"),
    (layout.verdict_key("p1", "cpu", "latency"), "verdicts/p1/cpu/latency.json"),
    (layout.release_key("adder", RELEASE), f"releases/adder/{RELEASE}.json"),
    (
        layout.attestation_key("adder", RELEASE, "verdict", "0123456789ab"),
        f"attestations/adder/{RELEASE}/verdict-0123456789ab.json",
    ),
    (layout.channel_key("adder", "production"), "channels/adder/production.json"),
    (layout.rollout_prefix("adder", "production", 3), "rollouts/adder/production/3"),
    (layout.status_key("p1", "download"), "status/p1/download.json"),
    (layout.status_key("p1", "compile", "cpu"), "status/p1/compile/cpu.json"),
    (layout.lock_key("bundles/x/manifest.json"), "locks/bundles/x/manifest.json.json"),
    (layout.evals_prefix(DIGEST), f"evals/{DIGEST}"),
]


@pytest.mark.parametrize(("key", "expected"), KEYS)
def test_keys_are_where_the_design_says(key: str, expected: str) -> None:
    assert key == expected
    assert check_relative_path(key) == key


BAD = ["", "..", "../x", "a/b", "/a", ".hidden", "a\n", "a b", "x" * 200]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "make",
    [
        layout.plan_key,
        lambda bad: layout.checkpoint_prefix(bad, "v1"),
        lambda bad: layout.checkpoint_prefix("adder", bad),
        layout.bundle_prefix,
        layout.measurement_key,
        layout.samples_prefix,
        lambda bad: layout.samples_key("m1", bad),
        layout.reference_prefix,
        lambda bad: layout.reference_key(DIGEST, bad),
        lambda bad: layout.verdict_key(bad, "cpu", "latency"),
        lambda bad: layout.verdict_key("p1", bad, "latency"),
        lambda bad: layout.verdict_key("p1", "cpu", bad),
        lambda bad: layout.release_key("adder", bad),
        lambda bad: layout.attestation_key("adder", RELEASE, bad, "x"),
        lambda bad: layout.attestation_key("adder", RELEASE, "verdict", bad),
        lambda bad: layout.channel_key("adder", bad),
        lambda bad: layout.rollout_prefix(bad, "production", 1),
        lambda bad: layout.status_key(bad, "download"),
        lambda bad: layout.status_key("p1", bad),
        layout.evals_prefix,
    ],
)
def test_no_part_leaves_its_folder(make: Callable[[str], str], bad: str) -> None:
    with pytest.raises(BadInput, match="not"):
        make(bad)


@pytest.mark.parametrize("bad", ["", "..", "/a", "a/../b", "a//b"])
def test_step_keys_may_have_parts_but_stay_inside(bad: str) -> None:
    with pytest.raises(BadInput):
        layout.lock_key(bad)
