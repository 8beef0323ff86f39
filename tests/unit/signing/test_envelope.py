"""Not one byte of a signed envelope can change without being found."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.signing.test_keys import OTHER_SEED, SEED, public_of

from trainyard.errors import BadInput, CorruptFile
from trainyard.settings import Settings
from trainyard.signing.envelope import look_into, open_envelope, seal
from trainyard.signing.keys import SigningKey, add_key, signing_key, trusted_keys
from trainyard.signing.trust import PublicKey, TrustedKeys

PAYLOAD = b'{"_type":"https://in-toto.io/Statement/v1","text":"a? b> c~ \xc3\xa9"}'
WHAT = "releases/adder/adder-0123456789ab.json"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, signing_key=SEED)


@pytest.fixture
def trusted(settings: Settings) -> TrustedKeys:
    return trusted_keys(settings)


@pytest.fixture
def envelope(settings: Settings) -> bytes:
    return seal(PAYLOAD, signing_key(settings))


def test_what_was_sealed_is_opened(envelope: bytes, trusted: TrustedKeys) -> None:
    opened = open_envelope(envelope, WHAT, trusted)

    assert opened.payload == PAYLOAD
    assert opened.key == trusted.keys[0]
    assert look_into(envelope, WHAT).payload == PAYLOAD
    assert look_into(envelope, WHAT).key_id == opened.key.key_id


def test_it_is_an_envelope_as_the_standard_says(envelope: bytes, trusted: TrustedKeys) -> None:
    document = json.loads(envelope)

    assert document["payloadType"] == "application/vnd.in-toto+json"
    assert base64.b64decode(document["payload"]) == PAYLOAD
    (signature,) = document["signatures"]
    assert signature["keyid"] == trusted.keys[0].key_id
    pae = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(PAYLOAD), PAYLOAD)
    key = trusted.keys[0].sslib_key()._crypto_key()
    key.verify(base64.b64decode(signature["sig"]), pae)  # type: ignore[union-attr, call-arg]


def test_the_same_payload_gets_the_same_envelope(envelope: bytes, settings: Settings) -> None:
    assert seal(PAYLOAD, signing_key(settings)) == envelope


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_anywhere_is_found_and_the_document_named(
    bit: int, envelope: bytes, trusted: TrustedKeys
) -> None:
    for place in range(len(envelope)):
        flipped = bytearray(envelope)
        flipped[place] ^= 1 << bit
        with pytest.raises(BadInput, match=WHAT):
            open_envelope(bytes(flipped), WHAT, trusted)


def test_another_byte_anywhere_is_found(envelope: bytes, trusted: TrustedKeys) -> None:
    # What reads the same in JSON or base64, such as other white space or the other alphabet.
    for place, old in enumerate(envelope):
        for new in b" \n\t\r+/-_=ABQgw09\"'\\":
            if new != old:
                changed = envelope[:place] + bytes([new]) + envelope[place + 1 :]
                with pytest.raises(BadInput, match=WHAT):
                    open_envelope(changed, WHAT, trusted)


@pytest.mark.parametrize("cut", [0, 1, 50, -1])
def test_a_cut_envelope_is_found(cut: int, envelope: bytes, trusted: TrustedKeys) -> None:
    with pytest.raises(CorruptFile, match=WHAT):
        open_envelope(envelope[:cut], WHAT, trusted)


def drop_the_signature(document: dict[str, Any]) -> None:
    document["signatures"] = []


def sign_twice(document: dict[str, Any]) -> None:
    document["signatures"].append({**document["signatures"][0], "keyid": "another"})


def add_a_field(document: dict[str, Any]) -> None:
    document["note"] = "hello"


def name_another_type(document: dict[str, Any]) -> None:
    document["payloadType"] = "text/plain"


def put_a_list(document: dict[str, Any]) -> None:
    document["signatures"] = ["x"]


@pytest.mark.parametrize(
    "change", [drop_the_signature, sign_twice, add_a_field, name_another_type, put_a_list]
)
def test_another_shape_is_refused(
    change: Callable[[dict[str, Any]], None], envelope: bytes, trusted: TrustedKeys
) -> None:
    document = json.loads(envelope)
    change(document)

    with pytest.raises(CorruptFile, match="not a signed envelope"):
        open_envelope((json.dumps(document, indent=2) + "\n").encode(), WHAT, trusted)


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b"\xff", b'"text"', b"1"])
def test_what_is_no_envelope_is_refused(data: bytes, trusted: TrustedKeys) -> None:
    with pytest.raises(CorruptFile, match=WHAT):
        open_envelope(data, WHAT, trusted)


def test_a_release_of_the_older_format_says_what_to_do(trusted: TrustedKeys) -> None:
    older = json.dumps({"schema": "trainyard/v1", "release_id": "adder-0123456789ab"}).encode()

    with pytest.raises(BadInput, match="format of an older Trainyard") as refused:
        open_envelope(older, WHAT, trusted)

    assert "publish it again" in refused.value.hint


def test_a_signature_cannot_take_the_id_of_a_trusted_key(
    settings: Settings, trusted: TrustedKeys
) -> None:
    stranger = signing_key(Settings(home=settings.home, signing_key=OTHER_SEED))
    document = json.loads(seal(PAYLOAD, stranger))
    document["signatures"][0]["keyid"] = trusted.keys[0].key_id

    with pytest.raises(BadInput, match="does not match its signature"):
        open_envelope((json.dumps(document, indent=2) + "\n").encode(), WHAT, trusted)


def test_a_key_that_signs_as_another_one_is_found_when_it_signs(settings: Settings) -> None:
    other = public_of(OTHER_SEED, settings)
    mixed = SigningKey(other, signing_key(settings).signer)

    with pytest.raises(BadInput, match=f"does not verify with its public key {other.short_id}"):
        seal(PAYLOAD, mixed)


@pytest.mark.parametrize("kind", ["ecdsa", "rsa"])
def test_the_kinds_of_key_that_aws_kms_has_are_verified(kind: str, settings: Settings) -> None:
    from securesystemslib.signer import CryptoSigner

    signer = getattr(CryptoSigner, f"generate_{kind}")()
    made = signer.public_key
    public = PublicKey(
        key_id=made.keyid, scheme=made.scheme, public_key=made.keyval["public"].strip() + "\n"
    )
    add_key(settings, public)

    sealed = seal(PAYLOAD, SigningKey(public, signer))

    assert open_envelope(sealed, WHAT, trusted_keys(settings)).payload == PAYLOAD
