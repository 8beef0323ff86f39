"""Every key belongs to one object; a key of no known shape belongs to itself."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from trainyard.store.objects import group, place_of
from trainyard.store.protocol import Entry

ID = "adder-0123456789ab"


@pytest.mark.parametrize(
    ("key", "kind", "prefix", "model"),
    [
        ("plans/p.json", "plan", "plans/p.json", ""),
        ("checkpoints/adder/v1/a/b.bin", "checkpoint", "checkpoints/adder/v1", "adder"),
        ("checkpoints/adder/v1/manifest.json", "checkpoint", "checkpoints/adder/v1", "adder"),
        ("bundles/k/graph.bin", "bundle", "bundles/k", ""),
        ("measurements/m.json", "measurement", "measurements/m.json", ""),
        ("samples/m/0a1b.json", "samples", "samples/m", ""),
        ("references/c/0a1b.json", "references", "references/c", ""),
        ("verdicts/p/cpu/latency.json", "verdicts", "verdicts/p", ""),
        ("reports/p/cpu/latency.html", "reports", "reports/p", ""),
        ("status/p/download.json", "status", "status/p", ""),
        (f"releases/adder/{ID}.json", "release", f"releases/adder/{ID}.json", "adder"),
        (f"attestations/adder/{ID}/x.json", "attestations", f"attestations/adder/{ID}", "adder"),
        ("channels/adder/staging.json", "channel", "channels/adder/staging.json", "adder"),
        ("rollouts/adder/s/12/looks/1.json", "rollout", "rollouts/adder/s/12", "adder"),
        ("evals/d/prompts.jsonl", "evals", "evals/d", ""),
        ("locks/bundles/k/manifest.json.json", "lock", "locks/bundles/k/manifest.json.json", ""),
        ("toolchains/0a1b.json", "toolchain", "toolchains/0a1b.json", ""),
        ("refreshes/adder.json", "refresh", "refreshes/adder.json", "adder"),
        ("archive/channels/a/s/1-x.json", "archive", "archive/channels/a/s/1-x.json", ""),
    ],
)
def test_known_keys(key: str, kind: str, prefix: str, model: str) -> None:
    place = place_of(key)
    assert (place.kind, place.prefix, place.model) == (kind, prefix, model)


@pytest.mark.parametrize(
    "key",
    [
        "x",
        "plans/p",
        "plans/a/p.json",
        "plans/../p.json",
        "checkpoints/adder/v1",
        "checkpoints/Adder/v1/x",
        "bundles/k",
        "releases/adder/notes.txt",
        "releases/adder/notes.json",
        "channels/adder/staging/x.json",
        "rollouts/adder/s/012/looks/1.json",
        "rollouts/adder/s/x/looks/1.json",
        "locks/x.txt",
        "models/x",
    ],
)
def test_unknown_keys(key: str) -> None:
    assert place_of(key).kind == "unknown"
    assert place_of(key).prefix == key


def test_an_object_is_as_young_as_its_youngest_part() -> None:
    old, young = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
    found = group(
        [Entry("bundles/k/b", 2, modified_at=old), Entry("bundles/k/a", 3, modified_at=young)]
    )

    assert list(found) == ["bundles/k"]
    bundle = found["bundles/k"]
    assert (bundle.size, bundle.modified_at, bundle.manifest, bundle.complete) == (
        *(5, young, ""),
        False,
    )


def test_one_part_of_unknown_age_makes_the_age_unknown() -> None:
    found = group(
        [
            Entry("bundles/k/b", 2, modified_at=datetime(2026, 1, 1, tzinfo=UTC)),
            Entry("bundles/k/a", 3),
        ]
    )

    assert found["bundles/k"].modified_at is None


def test_a_manifest_makes_it_complete() -> None:
    found = group([Entry("bundles/k/manifest.json", 2), Entry("bundles/k/x/manifest.json", 3)])

    assert found["bundles/k"].manifest == "bundles/k/manifest.json"
    assert found["bundles/k"].complete
