"""Transcripts: signed, found again, and what does not count is told."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.unit.proof_files import IMAGE, PASSED, proof
from tests.unit.yard import MOMENT

from trainyard.documents.proof import Proof, ProofStep, payload_of_proof, proof_of_payload
from trainyard.proofs import read_proofs, store_proof
from trainyard.settings import Settings
from trainyard.signing.keys import signing_key
from trainyard.store.folder import FolderStore
from trainyard.store.objects import place_of

FAILED = ProofStep(name="drain", state="failed", detail="It hung.")
SKIPPED = ProofStep(name="compile on a CPU", state="skipped", detail="The lane cannot.")
TRIPLE = (IMAGE, "trn2.48xlarge", "neuron-native")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def store(settings: Settings) -> FolderStore:
    return FolderStore(settings.store_root)


def keep(store: FolderStore, settings: Settings, *proofs: Proof) -> list[str]:
    return [store_proof(store, each, signing_key(settings)) for each in proofs]


def test_a_transcript_is_signed_and_found_by_image_instance_and_lane(
    store: FolderStore, settings: Settings
) -> None:
    (key,) = keep(store, settings, proof())
    assert key == "proofs/neuron-native/trn2.48xlarge/adder-0123456789ab.json"
    assert place_of(key).kind == "proof"
    found = read_proofs(store, settings)
    assert found.ignored == ()
    assert found.find(*TRIPLE) == proof()
    assert found.find(IMAGE, "trn2.3xlarge", "neuron-native") is None
    assert found.find("another", *TRIPLE[1:]) is None
    envelope = json.loads(store.read(key).data)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"


def test_storing_it_twice_is_fine(store: FolderStore, settings: Settings) -> None:
    assert keep(store, settings, proof(), proof()) == keep(store, settings, proof()) * 2
    assert len(read_proofs(store, settings).proofs) == 1


@pytest.mark.parametrize(
    ("steps", "proven"),
    [((PASSED,), True), ((PASSED, SKIPPED), True), ((PASSED, FAILED), False), ((SKIPPED,), False)],
)
def test_what_failed_or_was_not_tried_proves_nothing(
    store: FolderStore, settings: Settings, steps: Any, proven: bool
) -> None:
    keep(store, settings, proof(steps=steps))
    assert (read_proofs(store, settings).find(*TRIPLE) is not None) == proven


def test_the_newest_transcript_counts(store: FolderStore, settings: Settings) -> None:
    later = MOMENT + timedelta(days=1)
    keep(store, settings, proof(), proof(proof_id="later", created_at=later, steps=(FAILED,)))
    assert read_proofs(store, settings).find(*TRIPLE) is None


def test_a_transcript_of_somebody_else_does_not_count(
    store: FolderStore, settings: Settings, tmp_path: Path
) -> None:
    stranger = Settings(home=tmp_path / "elsewhere")
    (key,) = keep(store, stranger, proof())
    found = read_proofs(store, settings)
    assert found.find(*TRIPLE) is None
    (reason,) = found.ignored
    assert reason.startswith(f"{key} does not count: ")


def test_a_copy_in_another_place_or_a_changed_byte_does_not_count(
    store: FolderStore, settings: Settings
) -> None:
    (key,) = keep(store, settings, proof())
    data = store.read(key).data
    store.create("proofs/neuron-native/trn2.3xlarge/adder-0123456789ab.json", data)
    store.create("proofs/neuron-native/trn2.48xlarge/changed.json", data.replace(b"a", b"b", 1))
    store.create("proofs/stray", b"{}")
    found = read_proofs(store, settings)
    assert len(found.proofs) == 1
    assert len(found.ignored) == 3
    assert any("copy of another transcript" in reason for reason in found.ignored)


def test_a_payload_says_what_its_steps_say() -> None:
    payload = payload_of_proof(proof())
    assert proof_of_payload(payload) == proof()
    with pytest.raises(ValueError, match="contradict"):
        proof_of_payload(payload.replace(b'"PASSED"', b'"FAILED"'))
    digest = "a" * 64
    subject = json.loads(payload_of_proof(proof(image=f"r.example/x@sha256:{digest}")))["subject"]
    assert subject == [{"name": "r.example/x", "digest": {"sha256": digest}}]
