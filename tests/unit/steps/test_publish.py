"""Only what its measurement proves is published; it is signed, and stored once."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.unit.yard import (
    COMPILE_KEY,
    SERVING,
    SPEC,
    Yard,
    behaviour,
    case,
    measurement,
    plan,
    spec,
)

from trainyard.canonical import digest
from trainyard.documents.behaviour import Capability
from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.plan import Plan
from trainyard.documents.release import Release
from trainyard.errors import (
    BadInput,
    Conflict,
    CorruptFile,
    NotFound,
    Refused,
    Transient,
    UnusableKey,
)
from trainyard.materialize import materialize_release
from trainyard.releases import (
    list_attestations,
    list_releases,
    list_verdicts,
    load_release,
    pins_not_held,
    published_by_plan,
    release_of_plan,
)
from trainyard.settings import Settings
from trainyard.signing.keys import (
    SigningKey,
    add_key,
    new_local_key,
    retire,
    revoke,
    signing_key,
    trusted_keys,
)
from trainyard.steps.context import StepContext
from trainyard.steps.gate import gate
from trainyard.steps.publish import publish
from trainyard.store.documents import read_document, substance
from trainyard.store.folder import FolderStore
from trainyard.store.layout import (
    bundle_manifest_key,
    checkpoint_manifest_key,
    measurement_key,
    release_key,
    verdict_key,
)

NAMED = (
    checkpoint_manifest_key("adder", "v1"),
    bundle_manifest_key(COMPILE_KEY),
    measurement_key("candidate"),
    verdict_key("adder-plan", "cpu", "accuracy"),
    verdict_key("adder-plan", "cpu", "latency"),
)


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    """A yard in which everything before publication has been done."""
    yard = Yard(tmp_path)
    yard.keep_artifacts()
    judged(yard, plan(), measurement())
    return yard


def judged(yard: Yard, asked: Plan, *measurements: Measurement) -> Plan:
    yard.keep_plan(asked)
    yard.keep(*measurements)
    for name in ("accuracy", "latency"):
        gate(asked, "cpu", name, yard.context)
    return asked


def only_release(yard: Yard) -> Release:
    (release,) = list_releases(yard.store, "adder")
    return release


def replace(yard: Yard, key: str, document: Any) -> None:
    yard.store.replace(key, document.to_bytes(), version=yard.store.read(key).version)


def context_with(yard: Yard, store: FolderStore) -> StepContext:
    return StepContext(yard.settings, store, yard.context.progress, yard.context.work_dir)


def test_a_release_pins_everything_it_is_made_of_and_is_signed(yard: Yard) -> None:
    result = publish(plan(), "cpu", yard.context)

    release = load_release(yard.store, "adder", only_release(yard).release_id, yard.settings)
    assert result.key == release_key("adder", release.release_id)
    assert result.message == f"Published {release.release_id}."
    assert result.detail["release_id"] == release.release_id
    assert not result.reused
    assert release.checkpoint_digest == digest("checkpoint")
    assert release.bundle_digest == digest("bundle")
    assert (release.revision, release.measurement_id, release.lane) == ("v1", "candidate", "cpu")
    assert release.spec == spec()
    assert set(release.provenance.inputs) == {"plans/adder-plan.json", *NAMED[:3]}
    assert (release.source, release.request) == ("file:models", plan().request)


def test_a_release_holds_what_it_names_byte_for_byte(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)

    release = only_release(yard)
    assert {pin.key: pin.sha256 for pin in release.pins} == {
        key: hashlib.sha256(yard.store.read(key).data).hexdigest() for key in NAMED
    }
    assert [pin.name for pin in release.pins] == [
        "checkpoint-manifest",
        "bundle-manifest",
        "measurement",
        "verdict/accuracy",
        "verdict/latency",
    ]


def test_the_statement_names_the_images_that_serve_and_that_published(yard: Yard) -> None:
    serving_image, own_image = f"neuron@sha256:{'1' * 64}", f"yard@sha256:{'2' * 64}"
    serving = {**SERVING, "image": serving_image}
    asked = plan("image-plan", measurement_id="with-image")
    (planned,) = asked.targets
    changes = {"serving": serving, "serving_digest": digest(serving)}
    asked = asked.model_copy(update={"targets": (planned.model_copy(update=changes),)})
    judged(yard, asked, measurement("with-image", serving_digest=digest(serving)))
    settings = Settings(home=yard.settings.home, image=own_image)

    result = publish(
        asked,
        "cpu",
        StepContext(settings, yard.store, yard.context.progress, yard.context.work_dir),
    )

    envelope = json.loads(yard.store.read(str(result.key)).data)
    predicate = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
    images = [
        each
        for each in predicate["buildDefinition"]["resolvedDependencies"]
        if each["name"] == "image"
    ]
    assert images == [{"name": "image", "uri": serving_image, "digest": {"sha256": "1" * 64}}]
    assert predicate["runDetails"]["builder"]["builderDependencies"] == [
        {"name": "image", "uri": own_image, "digest": {"sha256": "2" * 64}}
    ]
    release = only_release(yard)
    assert (release.image, release.provenance.image) == (serving_image, own_image)


def test_the_id_follows_from_what_is_served(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)

    release = only_release(yard)
    made_of = [release.checkpoint_digest, release.compile_key, release.serving_digest]
    assert release.release_id == f"adder-{digest(made_of)[:12]}"


def test_the_verdicts_are_attested_with_their_digests(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)

    attested = list_attestations(yard.store, "adder", only_release(yard).release_id)
    signed = list_verdicts(yard.store, "adder", only_release(yard).release_id, yard.settings)
    assert [each.subject for each in signed] == [each.subject for each in attested]
    assert {each.kind for each in attested} == {"verdict"}
    by_gate = {each.subject["gate"]: each.subject for each in attested}
    assert set(by_gate) == {"accuracy", "latency"}
    for name, subject in by_gate.items():
        verdict = read_document(yard.store, f"verdicts/adder-plan/cpu/{name}.json", GateVerdict)
        assert subject["outcome"] == "pass"
        assert subject["key"] == f"verdicts/adder-plan/cpu/{name}.json"
        assert subject["digest"] == digest(
            verdict.model_dump(mode="json", by_alias=True, exclude={"created_at", "provenance"})
        )


def test_publishing_again_changes_nothing(yard: Yard) -> None:
    first = publish(plan(), "cpu", yard.context)
    before = {entry.key: yard.store.read(entry.key).data for entry in yard.store.list("")}

    second = publish(plan(), "cpu", yard.context)

    assert second.reused
    assert second.key == first.key
    assert second.message == f"Release {first.detail['release_id']} was published before."
    assert before == {entry.key: yard.store.read(entry.key).data for entry in yard.store.list("")}


def test_the_plan_finds_its_release(yard: Yard) -> None:
    assert published_by_plan(yard.store, plan(), yard.settings) == {}

    publish(plan(), "cpu", yard.context)

    release_id = only_release(yard).release_id
    assert published_by_plan(yard.store, plan(), yard.settings) == {"cpu": release_id}
    found = release_of_plan(yard.store, "adder-plan", "cpu", yard.settings)
    assert found.release_id == release_id


def test_a_later_plan_keeps_the_release_and_adds_its_verdicts(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)
    first = only_release(yard)
    changed = spec(description="Adds numbers.", rollout={"bake_s": 5})
    later = plan("later-plan", model_spec=changed)
    judged(yard, later)

    result = publish(later, "cpu", yard.context)

    assert only_release(yard) == first
    assert result.reused
    assert result.detail["kept"] == ["spec"]
    assert "It keeps what it was signed with then: its spec differ" in result.message
    attested = list_attestations(yard.store, "adder", first.release_id, "verdict")
    assert {each.subject["plan_id"] for each in attested} == {"adder-plan", "later-plan"}
    assert published_by_plan(yard.store, later, yard.settings) == {"cpu": first.release_id}


def test_a_plan_that_failed_its_gates_has_not_published_an_older_release(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)
    stricter = {
        **SPEC["gates"],
        "accuracy": {"tasks": [{"name": "sums", "min": 0.99}]},
    }
    later = plan("strict-plan", model_spec=spec(gates=stricter))
    yard.keep_plan(later)

    with pytest.raises(Refused):
        publish(later, "cpu", yard.context)

    assert published_by_plan(yard.store, later, yard.settings) == {}
    with pytest.raises(NotFound, match="strict-plan published no release for target cpu"):
        release_of_plan(yard.store, "strict-plan", "cpu", yard.settings)


def test_a_stored_pass_does_not_help_a_bad_measurement(yard: Yard) -> None:
    # Somebody worsened the measurement, or forged the verdict: the measurement decides.
    replace(yard, measurement_key("candidate"), measurement(score=0.4))

    with pytest.raises(Refused, match=r"sums exact_match is 0\.4"):
        publish(plan(), "cpu", yard.context)

    assert list_releases(yard.store, "adder") == ()


@pytest.mark.parametrize(
    "forge",
    [
        lambda verdict: verdict.model_copy(update={"outcome": "fail"}),
        lambda verdict: verdict.model_copy(update={"summary": "All is well."}),
        lambda verdict: verdict.model_copy(update={"checks": verdict.checks[:1]}),
    ],
)
def test_a_verdict_that_does_not_follow_from_the_measurement_is_refused(
    forge: Callable[[GateVerdict], GateVerdict], yard: Yard
) -> None:
    key = verdict_key("adder-plan", "cpu", "accuracy")
    replace(yard, key, forge(read_document(yard.store, key, GateVerdict)))

    with pytest.raises(Refused, match="is not the one that follows from the measurement"):
        publish(plan(), "cpu", yard.context)

    assert list_releases(yard.store, "adder") == ()


def test_when_a_verdict_was_made_does_not_matter(yard: Yard) -> None:
    key = verdict_key("adder-plan", "cpu", "accuracy")
    verdict = read_document(yard.store, key, GateVerdict)
    later = verdict.created_at + timedelta(hours=1)
    replace(yard, key, verdict.model_copy(update={"created_at": later}))

    assert publish(plan(), "cpu", yard.context).key


@pytest.mark.parametrize("missing", NAMED)
def test_nothing_is_published_before_the_steps_before_are_done(missing: str, yard: Yard) -> None:
    yard.store.delete(missing)

    with pytest.raises(NotFound):
        publish(plan(), "cpu", yard.context)

    assert list_releases(yard.store, "adder") == ()


@pytest.mark.parametrize(
    ("checkpoint_digest", "architecture"),
    [(digest("another checkpoint"), "architecture"), (digest("checkpoint"), "another")],
)
def test_documents_of_another_checkpoint_are_refused(
    checkpoint_digest: str, architecture: str, yard: Yard
) -> None:
    yard.store.delete(checkpoint_manifest_key("adder", "v1"))
    yard.keep_artifacts(checkpoint_digest=checkpoint_digest)
    asked = plan().model_copy(update={"architecture_digest": architecture})

    with pytest.raises(CorruptFile, match="does not belong to plan adder-plan"):
        publish(asked, "cpu", yard.context)


def test_a_release_of_the_same_id_that_serves_something_else_is_refused(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)
    first = only_release(yard)
    yard.store.delete(bundle_manifest_key(COMPILE_KEY))
    yard.keep_artifacts(bundle_digest=digest("compiled again"))

    with pytest.raises(Refused, match="differs in bundle_digest"):
        publish(plan(), "cpu", yard.context)

    assert only_release(yard) == first


def test_a_stored_release_that_was_changed_is_not_reused(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)
    key = release_key("adder", only_release(yard).release_id)
    stored = yard.store.read(key)
    envelope = json.loads(stored.data)
    payload = base64.b64decode(envelope["payload"]).replace(b'"revision":"v1"', b'"revision":"v0"')
    envelope["payload"] = base64.b64encode(payload).decode()
    data = json.dumps(envelope, indent=2).encode() + b"\n"
    yard.store.replace(key, data, version=stored.version)

    with pytest.raises(BadInput, match="changed after it was signed"):
        publish(plan(), "cpu", yard.context)


def test_a_release_of_a_revoked_key_is_signed_again_by_todays(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)
    old, _ = signing_key(yard.settings).public, new_local_key(yard.settings)
    revoke(yard.settings, old.key_id, "Leaked.")
    assert published_by_plan(yard.store, plan(), yard.settings) == {}

    result = publish(plan(), "cpu", yard.context)

    assert not result.reused
    assert "was revoked" in result.message
    release = load_release(yard.store, "adder", only_release(yard).release_id, yard.settings)
    assert release.signature is not None
    assert release.signature.key_id == signing_key(yard.settings).public.key_id
    assert len(list_verdicts(yard.store, "adder", release.release_id, yard.settings)) == 2
    assert published_by_plan(yard.store, plan(), yard.settings) == {"cpu": release.release_id}


def test_a_release_of_a_retired_key_is_kept(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)
    new_local_key(yard.settings)

    assert publish(plan(), "cpu", yard.context).reused


def test_a_release_dated_after_its_key_was_retired_is_signed_again_by_todays(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)
    old, _ = signing_key(yard.settings).public, new_local_key(yard.settings)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    add_key(yard.settings, old, not_after=yesterday)
    assert retire(yard.settings, old.key_id).not_after == yesterday
    with pytest.raises(UnusableKey, match="after its key"):
        load_release(yard.store, "adder", only_release(yard).release_id, yard.settings)
    assert published_by_plan(yard.store, plan(), yard.settings) == {}

    result = publish(plan(), "cpu", yard.context)

    assert "after its key" in result.message
    release = load_release(yard.store, "adder", only_release(yard).release_id, yard.settings)
    assert published_by_plan(yard.store, plan(), yard.settings) == {"cpu": release.release_id}
    assert publish(plan(), "cpu", yard.context).reused


def test_a_key_replaced_before_the_verdicts_are_signed_poisons_nothing(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced_right_after(settings: Settings) -> SigningKey:
        key = signing_key(settings)
        new_local_key(settings)
        return key

    with monkeypatch.context() as patched:
        patched.setattr("trainyard.steps.publish.signing_key", replaced_right_after)
        with pytest.raises(Transient, match="was replaced while this was published"):
            publish(plan(), "cpu", yard.context)
    assert list_releases(yard.store, "adder") == ()

    result = publish(plan(), "cpu", yard.context)

    release_id = result.detail["release_id"]
    assert published_by_plan(yard.store, plan(), yard.settings) == {"cpu": release_id}


def test_a_verdict_that_was_stored_with_a_key_just_replaced_is_signed_again(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The key is replaced after the last look at the trusted keys.
    old = signing_key(yard.settings)
    before = trusted_keys(yard.settings)
    new_local_key(yard.settings)
    with monkeypatch.context() as patched:
        patched.setattr("trainyard.steps.publish.signing_key", lambda _: old)
        patched.setattr("trainyard.steps.publish.trusted_keys", lambda _: before)
        release_id = publish(plan(), "cpu", yard.context).detail["release_id"]
    assert list_verdicts(yard.store, "adder", release_id, yard.settings) == ()

    publish(plan(), "cpu", yard.context)

    assert published_by_plan(yard.store, plan(), yard.settings) == {"cpu": release_id}


def test_a_release_whose_manifest_was_made_again_is_signed_again(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)
    yard.store.delete(NAMED[0])
    yard.keep_artifacts()

    result = publish(plan(), "cpu", yard.context)

    assert f"again: {NAMED[0]} is gone or was made again." in result.message
    assert publish(plan(), "cpu", yard.context).reused


class Sweeping(FolderStore):
    """A store from which garbage collection takes a key right after a release is stored."""

    taken: str = ""

    def create(self, key: str, data: bytes) -> str:
        version = super().create(key, data)
        if key.startswith("releases/"):
            self.delete(self.taken)
        return version


@pytest.mark.parametrize("taken", NAMED)
def test_a_release_whose_parts_were_collected_meanwhile_is_withdrawn(
    taken: str, yard: Yard
) -> None:
    store = Sweeping(yard.store.root)
    store.taken = taken

    with pytest.raises(Transient, match="so the release was withdrawn") as gone:
        publish(plan(), "cpu", context_with(yard, store))

    assert taken in gone.value.message
    assert list_releases(yard.store, "adder") == ()


class Outrun(FolderStore):
    """A store in which somebody else always publishes first."""

    theirs: bytes = b""

    def create(self, key: str, data: bytes) -> str:
        if key.startswith("releases/"):
            if self.theirs:
                super().create(key, self.theirs)
            raise Conflict(f"{key} exists already.")
        return super().create(key, data)


def test_who_comes_second_takes_the_release_of_the_first(yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)
    key = release_key("adder", only_release(yard).release_id)
    store = Outrun(yard.store.root)
    store.theirs = yard.store.read(key).data
    yard.store.delete(key)

    result = publish(plan(), "cpu", context_with(yard, store))

    assert result.reused
    assert yard.store.read(key).data == store.theirs


def test_a_conflict_without_a_release_is_passed_on(yard: Yard) -> None:
    with pytest.raises(Conflict):
        publish(plan(), "cpu", context_with(yard, Outrun(yard.store.root)))


def test_a_warning_is_published_and_attested(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    yard.keep_artifacts()
    slow = measurement(
        figures={"ttft_p99_ms": 210, "output_tokens_per_s": 45, "failed_requests": 0}
    )
    judged(yard, plan(), slow)

    result = publish(plan(), "cpu", yard.context)

    assert result.detail["verdicts"] == {"accuracy": "pass", "latency": "warn"}
    assert published_by_plan(yard.store, plan(), yard.settings)


def test_a_release_carries_what_its_lane_does_not_support(tmp_path: Path) -> None:
    unsupported = Capability(ability="unsupported", why="The sampler drops them.")
    recorded = behaviour({"penalties": (case("broken"),)}, {"penalties": unsupported})
    yard = Yard(tmp_path)
    yard.keep_artifacts()
    asked = judged(yard, plan(), measurement(behaviour=recorded))

    result = publish(asked, "cpu", yard.context)

    (words,) = result.detail["warnings"]
    assert "behaviour penalties: not supported by the lane" in words
    assert words in result.message
    verdicts = list_verdicts(yard.store, "adder", result.detail["release_id"], yard.settings)
    carried = {each.subject["gate"]: each.warnings for each in verdicts}
    assert carried == {"accuracy": (words,), "latency": ()}


def test_two_publications_say_the_same(yard: Yard, tmp_path: Path) -> None:
    publish(plan(), "cpu", yard.context)
    twin = Yard(tmp_path / "twin")
    twin.keep_artifacts()
    judged(twin, plan(), measurement())
    publish(plan(), "cpu", twin.context)

    said = [
        # The documents beside it carry the moment in which they were made.
        substance(only_release(each).model_copy(update={"pins": ()}))
        for each in (yard, twin)
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("key", NAMED[:2])
def test_a_flipped_byte_in_a_manifest_is_found_before_serving(
    key: str, yard: Yard, tmp_path: Path
) -> None:
    publish(plan(), "cpu", yard.context)
    release = only_release(yard)
    stored = yard.store.read(key).data

    for place in range(0, len(stored), 7):
        flipped = bytearray(stored)
        flipped[place] ^= 1
        yard.store.put(key, bytes(flipped))
        with pytest.raises(CorruptFile, match=f"{key} is not the document that release"):
            materialize_release(yard.store, release, tmp_path / "node")


@pytest.mark.parametrize("key", NAMED)
def test_a_flipped_byte_in_whatever_a_release_names_is_found(key: str, yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)
    release = only_release(yard)
    assert pins_not_held(yard.store, release.pins) == []

    yard.store.put(key, yard.store.read(key).data.replace(b"2", b"3", 1))

    assert pins_not_held(yard.store, release.pins) == [key]


@pytest.mark.parametrize("folder", ["releases", "attestations"])
def test_a_flipped_byte_in_what_is_signed_is_found_and_named(folder: str, yard: Yard) -> None:
    publish(plan(), "cpu", yard.context)
    key = next(entry.key for entry in yard.store.list(folder))
    stored = yard.store.read(key).data

    for place in range(0, len(stored), 101):
        flipped = bytearray(stored)
        flipped[place] ^= 1
        yard.store.put(key, bytes(flipped))
        with pytest.raises(BadInput, match=key):
            published_by_plan(yard.store, plan(), yard.settings)


class Killed(BaseException):
    """The process dies here."""


class Dying(FolderStore):
    """A store whose process dies before or after its change number `left`."""

    left: int = 0
    after: bool = False

    def create(self, key: str, data: bytes) -> str:
        if self.left == 0 and not self.after:
            raise Killed
        version = super().create(key, data)
        if self.left == 0:
            raise Killed
        self.left -= 1
        return version


@pytest.mark.parametrize("after", [False, True])
def test_a_publication_may_die_at_every_change_and_run_again(after: bool, tmp_path: Path) -> None:
    deaths = 0
    for number in range(10):
        yard = Yard(tmp_path / str(number))
        yard.keep_artifacts()
        judged(yard, plan(), measurement())
        store = Dying(yard.store.root)
        store.left, store.after = number, after
        try:
            publish(plan(), "cpu", context_with(yard, store))
        except Killed:
            deaths += 1
        for release in list_releases(yard.store, "adder"):
            load_release(yard.store, "adder", release.release_id, yard.settings)
            assert pins_not_held(yard.store, release.pins) == []
        publish(plan(), "cpu", yard.context)
        assert list(published_by_plan(yard.store, plan(), yard.settings)) == ["cpu"]
        if deaths <= number:
            break
    assert deaths == 3
