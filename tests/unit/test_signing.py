"""A release is served only if a trusted key signed exactly what is in the store."""

from __future__ import annotations

import base64
import json
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from tests.unit.yard import COMPILE_KEY, MOMENT, SERVING, spec

from trainyard.documents.release import Release
from trainyard.errors import BadInput
from trainyard.settings import Settings
from trainyard.signing import (
    key_id,
    sign_release,
    signing_key,
    trusted_keys,
    verify_release,
)

SEED = base64.b64encode(bytes(range(32))).decode()
OTHER_SEED = base64.b64encode(bytes(32)).decode()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def with_key(settings: Settings, seed: str) -> Settings:
    return Settings(home=settings.home, signing_key=seed)


def release() -> Release:
    model_spec = spec()
    return Release(
        created_at=MOMENT,
        release_id="adder-0123456789ab",
        model="adder",
        target=model_spec.targets[0],
        lane="cpu",
        checkpoint_key="checkpoints/adder/v1/manifest.json",
        checkpoint_digest="c" * 64,
        revision="v1",
        compile_key=COMPILE_KEY,
        bundle_digest="b" * 64,
        serving=SERVING,
        serving_digest="s" * 64,
        served_model_name="adder",
        toolchain={"vllm": "0.32.0"},
        measurement_id="m1",
        spec=model_spec,
    )


def stored(signed: Release, change: Callable[[dict[str, Any]], None] | None = None) -> Release:
    """Return the release as it reads back from the store, after a change of its JSON."""
    document = json.loads(signed.to_bytes())
    if change is not None:
        change(document)
    return Release.model_validate_json(json.dumps(document))


def test_a_signed_release_verifies_as_made_and_as_read_back(settings: Settings) -> None:
    signed = sign_release(release(), signing_key(settings))

    verify_release(signed, trusted_keys(settings))
    verify_release(stored(signed), trusted_keys(settings))
    assert signed.model_copy(update={"signature": None}) == release()


def test_the_same_release_gets_the_same_signature(settings: Settings) -> None:
    first, second = (sign_release(release(), signing_key(settings)) for _ in range(2))

    assert first.to_bytes() == second.to_bytes()


def change_revision(document: dict[str, Any]) -> None:
    document["revision"] = "v2"


def change_rollout(document: dict[str, Any]) -> None:
    document["spec"]["rollout"]["bake_s"] = 0.0


def change_date(document: dict[str, Any]) -> None:
    document["created_at"] = "2026-11-22T12:00:01Z"


def remove_a_field(document: dict[str, Any]) -> None:
    del document["image"]


def spoil_the_value(document: dict[str, Any]) -> None:
    document["signature"]["value"] = base64.b64encode(bytes(64)).decode()


@pytest.mark.parametrize(
    "change", [change_revision, change_rollout, change_date, remove_a_field, spoil_the_value]
)
def test_a_change_after_the_signature_is_found(
    change: Callable[[dict[str, Any]], None], settings: Settings
) -> None:
    signed = sign_release(release(), signing_key(settings))

    with pytest.raises(BadInput, match="changed after it was signed"):
        verify_release(stored(signed, change), trusted_keys(settings))


def test_a_field_that_a_later_version_adds_leaves_old_signatures_valid(
    settings: Settings,
) -> None:
    class LaterRelease(Release):
        region: str = "anywhere"

    signed = sign_release(release(), signing_key(settings))

    read_later = LaterRelease.model_validate_json(signed.to_bytes())

    assert read_later.region == "anywhere"
    verify_release(read_later, trusted_keys(settings))


def test_an_unsigned_release_is_refused(settings: Settings) -> None:
    with pytest.raises(BadInput, match="adder-0123456789ab is not signed"):
        verify_release(release(), trusted_keys(settings))


def test_an_unknown_key_is_refused_and_named(settings: Settings) -> None:
    stranger = signing_key(with_key(settings, OTHER_SEED))
    own = signing_key(settings)
    signed = sign_release(release(), stranger)

    with pytest.raises(BadInput, match=key_id(stranger.public)) as refused:
        verify_release(signed, trusted_keys(settings))

    assert key_id(own.public) in refused.value.message
    assert "keys/trusted" in refused.value.hint


def test_a_signature_cannot_bring_its_own_key(settings: Settings) -> None:
    stranger = signing_key(with_key(settings, OTHER_SEED))
    own = signing_key(settings)
    signed = sign_release(release(), stranger)

    def rename(document: dict[str, Any]) -> None:
        document["signature"]["key_id"] = key_id(own.public)

    with pytest.raises(BadInput, match="holds another one"):
        verify_release(stored(signed, rename), trusted_keys(settings))


@pytest.mark.parametrize("field", ["public_key", "value"])
@pytest.mark.parametrize("text", ["", "not base64!", "QUJD", "é"])
def test_a_garbled_signature_is_bad_input(field: str, text: str, settings: Settings) -> None:
    signed = sign_release(release(), signing_key(settings))

    def garble(document: dict[str, Any]) -> None:
        document["signature"][field] = text

    with pytest.raises(BadInput, match="signature of release adder-0123456789ab holds no valid"):
        verify_release(stored(signed, garble), trusted_keys(settings))


def test_the_key_comes_from_the_settings_and_no_file_is_made(settings: Settings) -> None:
    key = signing_key(with_key(settings, SEED))

    assert not (settings.home / "keys").exists()
    assert trusted_keys(with_key(settings, SEED)) == {key_id(key.public): key.public}


def test_the_first_key_is_private_and_stays(settings: Settings) -> None:
    first = signing_key(settings)
    path = settings.home / "keys" / "release-signing.key"

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert signing_key(settings).public == first.public
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "release-signing.key",
        "release-signing.pub",
    ]


def test_many_who_need_the_first_key_at_once_get_the_same(settings: Settings) -> None:
    together = Barrier(8)

    def first_use(_: int) -> bytes:
        together.wait()
        return signing_key(settings).public

    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(first_use, range(8)))

    assert len(keys) == 1
    assert signing_key(settings).public in keys


def test_an_installation_that_never_signed_trusts_nobody_and_makes_no_key(
    settings: Settings,
) -> None:
    signed = sign_release(release(), signing_key(with_key(settings, SEED)))

    assert trusted_keys(settings) == {}
    with pytest.raises(BadInput, match="trusted: none"):
        verify_release(signed, trusted_keys(settings))
    assert not (settings.home / "keys").exists()


def test_a_public_key_that_is_copied_is_trusted(tmp_path: Path) -> None:
    yard, server = Settings(home=tmp_path / "yard"), Settings(home=tmp_path / "server")
    signed = sign_release(release(), signing_key(yard))
    trusted = server.home / "keys" / "trusted"
    trusted.mkdir(parents=True)
    public = (yard.home / "keys" / "release-signing.pub").read_text()

    (trusted / "yard.pub").write_text(f"# the yard's keys\n\n{public}")

    verify_release(stored(signed), trusted_keys(server))


def test_a_key_that_was_replaced_is_still_trusted_if_listed(settings: Settings) -> None:
    old = signing_key(with_key(settings, OTHER_SEED))
    signed = sign_release(release(), old)
    trusted = settings.home / "keys" / "trusted"
    trusted.mkdir(parents=True)
    (trusted / "old.pub").write_text(base64.b64encode(old.public).decode())
    new = signing_key(settings)

    verify_release(signed, trusted_keys(settings))
    assert set(trusted_keys(settings)) == {key_id(old.public), key_id(new.public)}


@pytest.mark.parametrize("seed", ["short", base64.b64encode(b"x" * 31).decode(), "é" * 44])
def test_a_bad_key_is_refused_without_showing_it(seed: str, settings: Settings) -> None:
    with pytest.raises(BadInput, match="TRAINYARD_SIGNING_KEY holds no valid signing key") as error:
        signing_key(with_key(settings, seed))

    assert seed not in str(error.value)


def test_a_key_that_others_can_read_is_refused(settings: Settings) -> None:
    signing_key(settings)
    path = settings.home / "keys" / "release-signing.key"
    path.chmod(0o644)

    with pytest.raises(BadInput, match=r"Other users can read .* \(mode 644\)") as error:
        signing_key(settings)

    assert "chmod 600" in error.value.hint


def test_a_bad_trusted_key_is_named_with_its_line(settings: Settings) -> None:
    trusted = settings.home / "keys" / "trusted"
    trusted.mkdir(parents=True)
    (trusted / "yard.pub").write_bytes(b"# fine\n\xff\xfe\n")

    with pytest.raises(BadInput, match=r"Line 2 of .*yard\.pub holds no valid public key"):
        trusted_keys(settings)


def test_a_key_file_that_is_none_is_bad_input(settings: Settings) -> None:
    (settings.home / "keys" / "trusted" / "folder.pub").mkdir(parents=True)

    with pytest.raises(BadInput, match="cannot be read"):
        trusted_keys(settings)


def test_a_key_does_not_show_itself(settings: Settings) -> None:
    assert SEED not in repr(signing_key(with_key(settings, SEED)))
