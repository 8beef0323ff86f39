"""Releases are signed by one key, verified by those that are trusted, and keys can be replaced."""

from __future__ import annotations

import base64
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import pytest

from trainyard.errors import BadInput, CorruptFile, NotFound, RevokedKey
from trainyard.settings import Settings
from trainyard.signing.keys import (
    add_key,
    new_local_key,
    retire,
    revoke,
    signing_key,
    trusted_keys,
)
from trainyard.signing.trust import PublicKey, TrustedKeys, check_date, public_key_of, read_trusted

SEED = base64.b64encode(bytes(range(32))).decode()
OTHER_SEED = base64.b64encode(bytes(32)).decode()
NOW = datetime.now(UTC)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def with_key(settings: Settings, seed: str) -> Settings:
    return Settings(home=settings.home, signing_key=seed)


def public_of(seed: str, settings: Settings) -> PublicKey:
    return signing_key(with_key(settings, seed)).public


def ids(keys: TrustedKeys) -> set[str]:
    return {key.key_id for key in keys.keys}


class TestTheKeyThatSigns:
    def test_it_comes_from_the_settings_and_no_file_is_made(self, settings: Settings) -> None:
        key = public_of(SEED, settings)

        assert not (settings.home / "keys").exists()
        assert ids(trusted_keys(with_key(settings, SEED))) == {key.key_id}

    def test_the_first_one_is_private_and_stays(self, settings: Settings) -> None:
        first = signing_key(settings)
        path = settings.home / "keys" / "release-signing.key"

        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert signing_key(settings).public == first.public
        assert path.with_suffix(".pub").read_text() == first.public.public_key
        assert sorted(each.name for each in path.parent.iterdir()) == [
            "release-signing.key",
            "release-signing.pub",
        ]

    def test_many_who_need_the_first_one_at_once_get_the_same(self, settings: Settings) -> None:
        together = Barrier(8)

        def first_use(_: int) -> str:
            together.wait()
            return signing_key(settings).public.key_id

        with ThreadPoolExecutor(8) as pool:
            keys = set(pool.map(first_use, range(8)))

        assert keys == {signing_key(settings).public.key_id}

    @pytest.mark.parametrize("seed", ["short", base64.b64encode(b"x" * 31).decode(), "é" * 44])
    def test_a_bad_one_is_refused_without_showing_it(self, seed: str, settings: Settings) -> None:
        with pytest.raises(BadInput, match="TRAINYARD_SIGNING_KEY holds no valid") as error:
            signing_key(with_key(settings, seed))

        assert seed not in str(error.value)

    def test_one_that_others_can_read_is_refused(self, settings: Settings) -> None:
        signing_key(settings)
        (settings.home / "keys" / "release-signing.key").chmod(0o644)

        with pytest.raises(BadInput, match=r"Other users can read .* \(mode 644\)") as error:
            signing_key(settings)

        assert "chmod 600" in error.value.hint

    def test_it_does_not_show_itself(self, settings: Settings) -> None:
        key = signing_key(with_key(settings, SEED))

        assert SEED not in repr(key)
        assert "signer" not in repr(key)

    def test_a_revoked_one_signs_no_more(self, settings: Settings) -> None:
        revoke(settings, signing_key(settings).public.key_id, "Leaked.")

        with pytest.raises(BadInput, match="that signs here is revoked"):
            signing_key(settings)

    def test_two_at_once_are_refused(self, settings: Settings) -> None:
        both = Settings(home=settings.home, signing_key=SEED, signing_kms_key="alias/yard")

        with pytest.raises(BadInput, match="Both"):
            signing_key(both)


class TestTrust:
    def test_who_never_signed_trusts_nobody_and_makes_no_key(self, settings: Settings) -> None:
        assert trusted_keys(settings) == TrustedKeys()
        assert not (settings.home / "keys").exists()

    def test_an_unknown_key_is_refused_and_named(self, settings: Settings) -> None:
        stranger = public_of(OTHER_SEED, settings)
        own = signing_key(settings).public

        with pytest.raises(BadInput, match=f"key {stranger.short_id}.* not trusted") as refused:
            trusted_keys(settings).demand(stranger.key_id, "Release x")

        assert own.short_id in refused.value.message
        assert "trainyard keys add" in refused.value.hint

    def test_a_public_key_that_was_copied_is_trusted(self, tmp_path: Path) -> None:
        yard, server = Settings(home=tmp_path / "yard"), Settings(home=tmp_path / "server")
        key_id = signing_key(yard).public.key_id
        pem = (yard.home / "keys" / "release-signing.pub").read_text()

        add_key(server, public_key_of(pem, "the file"), comment="the yard")

        key = trusted_keys(server).demand(key_id, "Release x")
        assert (key.comment, key.state, key.scheme) == ("the yard", "valid", "ed25519")

    def test_the_file_may_be_anywhere_and_read_only(
        self, settings: Settings, tmp_path: Path
    ) -> None:
        key = add_key(settings, public_of(SEED, settings))
        mounted = tmp_path / "mounted.json"
        mounted.write_bytes(settings.trusted_keys_file.read_bytes())
        mounted.chmod(0o444)

        pod = Settings(home=tmp_path / "pod", trusted_keys=mounted)

        assert ids(trusted_keys(pod)) == {key.key_id}
        assert not pod.home.exists()

    def test_many_who_add_keys_at_once_lose_none(self, settings: Settings) -> None:
        keys = [public_of(base64.b64encode(bytes([n] * 32)).decode(), settings) for n in range(12)]

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda key: add_key(settings, key), keys))

        assert ids(trusted_keys(settings)) == {key.key_id for key in keys}

    @pytest.mark.parametrize("pem", ["", "rubbish", "-----BEGIN PUBLIC KEY-----\nAAAA\n"])
    def test_what_is_no_public_key_is_refused(self, pem: str) -> None:
        with pytest.raises(BadInput, match=r"yard\.pem holds no valid public key"):
            public_key_of(pem, "yard.pem")

    def test_a_key_under_the_id_of_another_is_found(self, settings: Settings) -> None:
        add_key(settings, public_of(SEED, settings))
        other = public_of(OTHER_SEED, settings)
        document = json.loads(settings.trusted_keys_file.read_text())
        document["keys"][0]["public_key"] = other.public_key
        settings.trusted_keys_file.write_text(json.dumps(document))

        with pytest.raises(CorruptFile, match=r"Key 1 of .* does not have the id"):
            trusted_keys(settings)

    def test_a_file_that_is_none_is_named(self, settings: Settings) -> None:
        settings.trusted_keys_file.parent.mkdir()
        settings.trusted_keys_file.write_text('{"keys": [{}]}')

        with pytest.raises(CorruptFile, match=r"trusted-keys\.json holds no trusted keys"):
            trusted_keys(settings)

    def test_a_file_that_cannot_be_read_is_named(self, settings: Settings) -> None:
        settings.trusted_keys_file.mkdir(parents=True)

        with pytest.raises(BadInput, match="cannot be read"):
            trusted_keys(settings)
        with pytest.raises(BadInput, match="cannot be"):
            add_key(settings, public_of(SEED, settings))


class TestRotation:
    def test_what_the_old_key_signed_stays_valid_and_it_signs_no_more(
        self, settings: Settings
    ) -> None:
        old = signing_key(settings).public

        new, replaced = new_local_key(settings)

        assert replaced == old
        assert signing_key(settings).public == new
        key = trusted_keys(settings).demand(old.key_id, "Release x")
        assert key.state == "retired"
        check_date(key, NOW - timedelta(hours=1), "Release x")
        with pytest.raises(BadInput, match=r"after its key .* was replaced"):
            check_date(key, datetime.now(UTC) + timedelta(hours=1), "Release x")

    def test_the_first_key_can_be_made_by_it(self, settings: Settings) -> None:
        new, replaced = new_local_key(settings)

        assert replaced is None
        assert signing_key(settings).public == new
        assert ids(trusted_keys(settings)) == {new.key_id}
        assert (settings.home / "keys" / "release-signing.pub").read_text() == new.public_key

    def test_three_times_leaves_all_keys_on_record(self, settings: Settings) -> None:
        keys = [new_local_key(settings)[0].key_id for _ in range(3)]

        states = [key.state for key in read_trusted(settings.trusted_keys_file).keys]
        assert [key.key_id for key in trusted_keys(settings).keys] == keys
        assert states == ["retired", "retired", "valid"]

    @pytest.mark.parametrize("given", [{"signing_key": SEED}, {"signing_kms_key": "alias/yard"}])
    def test_a_key_that_is_given_is_not_replaced(
        self, given: dict[str, str], settings: Settings
    ) -> None:
        with pytest.raises(BadInput, match=f"TRAINYARD_{next(iter(given)).upper()}"):
            new_local_key(Settings(home=settings.home, **given))

    def test_what_a_revoked_key_signed_is_refused_by_name(self, settings: Settings) -> None:
        key = add_key(settings, public_of(SEED, settings), comment="the old yard")

        revoke(settings, key.short_id, "The laptop was stolen.")

        with pytest.raises(RevokedKey, match=f"{key.short_id}.*The laptop was stolen") as refused:
            trusted_keys(settings).demand(key.key_id, "Release x")
        assert "trainyard publish" in refused.value.hint

    def test_a_revoked_key_never_comes_back(self, settings: Settings) -> None:
        public = public_of(SEED, settings)
        add_key(settings, public)
        first = revoke(settings, public.key_id, "Leaked.")

        again = revoke(settings, public.key_id, "")

        assert (again.revoked_at, again.reason) == (first.revoked_at, "Leaked.")
        with pytest.raises(BadInput, match="was revoked"):
            add_key(settings, public)

    def test_a_key_has_its_time(self, settings: Settings) -> None:
        begin, end = NOW + timedelta(days=1), NOW + timedelta(days=2)
        public = public_of(SEED, settings)
        key = add_key(settings, public, not_before=begin, not_after=end)

        assert key.state == "not yet valid"
        check_date(key, begin + timedelta(hours=1), "Release x")
        with pytest.raises(BadInput, match=r"before its key .* was valid"):
            check_date(key, NOW, "Release x")
        with pytest.raises(BadInput, match="would end before it begins"):
            add_key(settings, public, not_before=end, not_after=begin)

    def test_a_key_can_be_retired_without_a_new_one(self, settings: Settings) -> None:
        key = add_key(settings, public_of(SEED, settings))

        first = retire(settings, key.short_id)

        assert first.state == "retired"
        assert retire(settings, key.short_id).not_after == first.not_after

    def test_what_was_said_of_a_key_stays_unless_it_is_said_anew(self, settings: Settings) -> None:
        public = public_of(SEED, settings)
        begin, end = NOW - timedelta(days=2), NOW + timedelta(days=2)
        first = add_key(
            settings, public, comment="Ada", kms_key="alias/a", not_before=begin, not_after=end
        )

        assert add_key(settings, public, default_comment="the file's name") == first
        later = add_key(settings, public, not_after=end + timedelta(days=1))

        assert later == first.model_copy(update={"not_after": end + timedelta(days=1)})
        assert read_trusted(settings.trusted_keys_file).keys == (later,)
        with pytest.raises(BadInput, match="would end before it begins"):
            add_key(settings, public, not_before=end + timedelta(days=3))

    def test_a_retired_key_comes_back_only_with_another_end(self, settings: Settings) -> None:
        public = public_of(SEED, settings)
        add_key(settings, public)
        retired = retire(settings, public.key_id)

        with pytest.raises(BadInput, match="was retired: it ended on") as refused:
            add_key(settings, public, comment="again")

        assert "--not-after" in refused.value.hint
        assert read_trusted(settings.trusted_keys_file).keys == (retired,)
        assert add_key(settings, public, not_after=NOW + timedelta(days=9)).state == "valid"

    def test_a_key_is_found_by_the_beginning_of_its_id(self, settings: Settings) -> None:
        keys = [public_of(base64.b64encode(bytes([n] * 32)).decode(), settings) for n in range(20)]
        for key in keys:
            add_key(settings, key)
        trusted = trusted_keys(settings)

        assert trusted.find(keys[3].key_id[:20]).key_id == keys[3].key_id
        with pytest.raises(NotFound, match="No key 'xyz' is known"):
            trusted.find("xyz")
        with pytest.raises(NotFound):
            trusted.find("")
        beginnings = [key.key_id[0] for key in keys]
        shared = next(each for each in beginnings if beginnings.count(each) > 1)
        with pytest.raises(BadInput, match="could mean several keys"):
            trusted.find(shared)
