"""Rollouts with probes on real servers: what answers are worth decides as well.

The accuracy gate is told to let everything pass, so that a release whose answers are worse gets
as far as its canary, where its times and its errors are as good as the stable release's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import yaml
from tests.platform_world import (
    MODEL,
    PROMOTE,
    RELEASE,
    Platform,
    needs_everything,
    note,
    running_platform,
)

from trainyard.documents.channel import Rollout
from trainyard.documents.evidence import QUALITY, MetricVerdict
from trainyard.documents.look import Look
from trainyard.store.documents import read_document

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600), needs_everything]

REQUESTS_PER_S = 3.0
PROBES = {"prompts": "adder/addition.jsonl", "pairs_per_s": 2.0, "stop": ["."]}
"""200 prompts with what they must be answered, each scored once."""


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    """A platform whose releases are compared by probes too, with a stable one and clients."""
    with running_platform(hold_s=(20, 20), bake_s=10) as made:
        path = made.settings.catalogue / f"{MODEL}.yaml"
        spec = yaml.safe_load(path.read_text())
        spec["gates"]["accuracy"]["tasks"][0] |= {"min": 0, "max_drop": 1}
        spec["rollout"] |= {"probes": PROBES, "max_duration_s": 600, "max_hold_s": 600}
        path.write_text(yaml.safe_dump(spec, sort_keys=False))
        for revision in ("r1", "r2", "r3"):
            made.need(revision)
            assert made.release(revision, revision)
        assert made.ended(RELEASE, "r1") == "success", made.describe(RELEASE, "r1")
        promoted(made, "r1")
        for revision in ("r2", "r3"):
            assert made.ended(RELEASE, revision) == "success", made.describe(RELEASE, revision)
        made.start_traffic(REQUESTS_PER_S)
        yield made


def promoted(platform: Platform, revision: str) -> Rollout:
    """Promote the release of a revision; return its rollout after its end."""
    run_id = f"promote-{revision}"
    release_id = platform.release_of(revision)
    assert platform.trigger(PROMOTE, run_id, model=MODEL, release=release_id)
    began = time.monotonic()
    state = platform.ended(PROMOTE, run_id)
    rollout = platform.channel.rollout
    assert rollout is not None
    assert rollout.release_id == release_id
    assert state == ("success" if rollout.outcome == "promoted" else "failed")
    note(f"{revision}: {rollout.outcome} after {time.monotonic() - began:.0f} s. {rollout.reason}")
    return rollout


def quality(platform: Platform, rollout: Rollout) -> MetricVerdict:
    """Return what the judge said of the answers in the look that decided."""
    verdict = read_document(platform.store, rollout.evidence_key, Look).verdict
    assert verdict is not None
    (found,) = (one for one in verdict.metrics if one.metric == QUALITY)
    return found


def test_equal_answers_are_proven_before_a_promotion(platform: Platform) -> None:
    rollout = promoted(platform, "r2")
    assert rollout.outcome == "promoted", rollout.reason
    found = quality(platform, rollout)
    note(f"quality: {found.candidate_requests} pairs, {found.outcome}")
    assert found.outcome == "NON_INFERIOR"
    assert found.candidate_requests >= 80


def test_worse_answers_are_taken_back_although_nothing_else_is_wrong(platform: Platform) -> None:
    stable = platform.stable
    rollout = promoted(platform, "r3")
    assert rollout.outcome == "rolled_back", rollout.reason
    found = quality(platform, rollout)
    note(f"quality: {found.candidate_requests} pairs, {found.outcome}")
    assert found.outcome == "HARM"
    verdict = read_document(platform.store, rollout.evidence_key, Look).verdict
    assert verdict is not None
    assert [one.metric for one in verdict.metrics if one.outcome == "HARM"] == [QUALITY]
    assert platform.stable == stable


def test_no_client_saw_an_error_of_it(platform: Platform) -> None:
    seen = platform.stop_traffic()
    note(f"clients: {seen}")
    assert seen.errors == 0
