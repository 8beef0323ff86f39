"""Releases are found by what people type, and loaded only if they are what they claim."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from tests.unit.yard import COMPILE_KEY, MOMENT, SERVING, Yard, spec

from trainyard.documents.release import Release, Signature
from trainyard.errors import BadInput, CorruptFile, NotFound
from trainyard.releases import (
    list_attestations,
    list_releases,
    load_release,
    record_attestation,
    release_id_of,
    resolve_release,
    store_release,
    was_rejected,
)
from trainyard.signing.keys import signing_key
from trainyard.store.layout import release_key


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    return Yard(tmp_path)


def publish(yard: Yard, checkpoint: str, *, hours: int = 0, copied_to: str = "") -> Release:
    """Store a signed release of a checkpoint, and a copy of it somewhere else."""
    release_id = release_id_of(
        "adder", checkpoint_digest=checkpoint, compile_key=COMPILE_KEY, serving_digest="s"
    )
    model_spec = spec()
    release = Release(
        created_at=MOMENT + timedelta(hours=hours),
        release_id=release_id,
        model="adder",
        target=model_spec.targets[0],
        lane="cpu",
        checkpoint_key="checkpoints/adder/v1/manifest.json",
        checkpoint_digest=checkpoint,
        revision="v1",
        compile_key=COMPILE_KEY,
        bundle_digest="b",
        serving=SERVING,
        serving_digest="s",
        served_model_name="adder",
        toolchain={},
        measurement_id="m1",
        spec=model_spec,
    )
    signed, _ = store_release(yard.store, release, signing_key(yard.settings))
    if copied_to:
        stored = yard.store.read(release_key("adder", release_id))
        yard.store.create(copied_to, stored.data)
    return signed


def test_a_release_is_loaded_as_it_was_published(yard: Yard) -> None:
    signed = publish(yard, "c1")

    loaded = load_release(yard.store, "adder", signed.release_id, yard.settings)
    key = signing_key(yard.settings).public
    assert loaded.model_copy(update={"signature": None}) == signed
    assert loaded.signature == Signature(
        key_id=key.key_id, scheme="ed25519", signer="this installation"
    )


def test_a_release_that_does_not_exist_is_not_found(yard: Yard) -> None:
    with pytest.raises(NotFound, match="no release adder-0123456789ab of model adder"):
        load_release(yard.store, "adder", "adder-0123456789ab", yard.settings)


def test_a_copy_under_another_name_is_refused(yard: Yard) -> None:
    original = publish(yard, "c1", copied_to=release_key("adder", "adder-0123456789ab"))

    with pytest.raises(CorruptFile, match=f"holds the release {original.release_id}"):
        load_release(yard.store, "adder", "adder-0123456789ab", yard.settings)


def test_a_release_of_a_key_that_is_not_trusted_is_refused(yard: Yard, tmp_path: Path) -> None:
    signed = publish(yard, "c1")

    with pytest.raises(BadInput, match="not trusted here"):
        load_release(yard.store, "adder", signed.release_id, Yard(tmp_path / "other").settings)


@pytest.mark.parametrize("release_id", ["../../etc", "adder", "adder-xyz", ""])
def test_what_is_no_id_is_refused(release_id: str, yard: Yard) -> None:
    with pytest.raises(BadInput, match="is not a release id"):
        load_release(yard.store, "adder", release_id, yard.settings)


def test_a_list_has_the_newest_first(yard: Yard) -> None:
    releases = [publish(yard, f"c{hours}", hours=hours) for hours in (2, 1, 3)]

    listed = list_releases(yard.store, "adder")

    assert listed == (releases[2], releases[0], releases[1])


def test_a_model_without_releases_has_an_empty_list(yard: Yard) -> None:
    assert list_releases(yard.store, "adder") == ()


def test_a_release_is_found_by_id_by_its_digits_and_as_the_latest(yard: Yard) -> None:
    older, newest = publish(yard, "c1", hours=1), publish(yard, "c2", hours=2)
    digits = older.release_id.removeprefix("adder-")

    assert resolve_release(yard.store, "adder", older.release_id) == older.release_id
    assert resolve_release(yard.store, "adder", digits) == older.release_id
    assert resolve_release(yard.store, "adder", digits[:6]) == older.release_id
    assert resolve_release(yard.store, "adder", older.release_id[:-4]) == older.release_id
    assert resolve_release(yard.store, "adder", "latest") == newest.release_id


def test_a_beginning_of_several_is_refused_with_their_names(yard: Yard) -> None:
    releases = [publish(yard, f"c{index}") for index in range(40)]
    beginnings = [each.release_id.removeprefix("adder-")[0] for each in releases]
    shared = next(each for each in beginnings if beginnings.count(each) > 1)

    with pytest.raises(BadInput, match="could mean several releases") as several:
        resolve_release(yard.store, "adder", shared)

    meant = [each.release_id for each in releases if each.release_id[6] == shared]
    assert all(name in several.value.message for name in meant)


@pytest.mark.parametrize("text", ["", "latest", "fff", "other-0123456789ab", "../x"])
def test_what_matches_nothing_is_not_found(text: str, yard: Yard) -> None:
    with pytest.raises(NotFound):
        resolve_release(yard.store, "adder", text)


@pytest.mark.parametrize("text", ["", "adder-"])
def test_no_digits_mean_no_release(text: str, yard: Yard) -> None:
    publish(yard, "c1")

    with pytest.raises(NotFound):
        resolve_release(yard.store, "adder", text)


ID = "adder-0123456789ab"


def test_the_same_finding_twice_is_one(yard: Yard) -> None:
    subject = {"environment": "staging", "rollout": 3, "reason": "Slower."}

    first, second = (
        record_attestation(yard.store, "adder", ID, "rejection", subject) for _ in range(2)
    )

    assert first == second
    (found,) = list_attestations(yard.store, "adder", ID)
    assert (found.kind, found.subject) == ("rejection", subject)


def test_findings_are_listed_by_kind_and_in_their_order(yard: Yard) -> None:
    for rollout in (1, 2, 3):
        record_attestation(yard.store, "adder", ID, "promotion", {"rollout": rollout})
    record_attestation(yard.store, "adder", ID, "approval", {"who": "ada"})

    promotions = list_attestations(yard.store, "adder", ID, "promotion")
    assert [each.subject["rollout"] for each in promotions] == [1, 2, 3]
    assert len(list_attestations(yard.store, "adder", ID)) == 4


def test_a_rejection_is_remembered_for_that_release_alone(yard: Yard) -> None:
    record_attestation(yard.store, "adder", ID, "promotion", {"rollout": 1})
    assert not was_rejected(yard.store, "adder", ID)

    record_attestation(yard.store, "adder", ID, "rejection", {"rollout": 2})

    assert was_rejected(yard.store, "adder", ID)
    assert not was_rejected(yard.store, "adder", "adder-ba9876543210")
