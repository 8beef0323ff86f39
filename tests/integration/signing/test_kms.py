"""AWS KMS signs releases; its public key is fetched once, and nobody needs AWS to verify.

KMS is moto's server on loopback, which signs with real keys of its own. moto takes every message
for a raw one; the signer sends its digest, so that is taught to it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from trainyard.errors import BadInput, Transient
from trainyard.settings import Settings
from trainyard.signing.envelope import open_envelope, seal
from trainyard.signing.keys import add_kms_key, retire, signing_key, trusted_keys

pytestmark = pytest.mark.integration

WHAT = "releases/adder/adder-0123456789ab.json"
ALIAS = "alias/trainyard"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of the fake AWS."""
    from moto.kms import utils
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.ECDSAPrivateKey, "sign", sign_digest_with_ecdsa)
        patch.setattr(utils.RSAPrivateKey, "sign", sign_digest_with_rsa)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


HASHES = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}


def sign_digest_with_ecdsa(key: Any, message: bytes, signing_algorithm: str) -> bytes:
    kind = HASHES[signing_algorithm[-3:]]
    assert signing_algorithm.startswith("ECDSA_SHA_")
    signature: bytes = key.private_key.sign(message, ec.ECDSA(Prehashed(kind)))
    return signature


def sign_digest_with_rsa(key: Any, message: bytes, signing_algorithm: str) -> bytes:
    kind = HASHES[signing_algorithm[-3:]]
    assert signing_algorithm.startswith("RSASSA_PSS_SHA_")
    pss = padding.PSS(mgf=padding.MGF1(kind), salt_length=padding.PSS.DIGEST_LENGTH)
    signature: bytes = key.private_key.sign(message, pss, Prehashed(kind))
    return signature


@pytest.fixture
def kms(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the fake AWS, which is also what the code under test finds."""
    import boto3

    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "eu-central-1"),
        ("AWS_MAX_ATTEMPTS", "1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    return boto3.client("kms")


def new_key(kms: Any, spec: str = "ECC_NIST_P256", usage: str = "SIGN_VERIFY") -> str:
    made: str = kms.create_key(KeySpec=spec, KeyUsage=usage)["KeyMetadata"]["Arn"]
    return made


def yard(home: Path, key: str) -> Settings:
    return Settings(home=home, signing_kms_key=key)


@pytest.mark.parametrize(
    ("spec", "scheme"),
    [
        ("ECC_NIST_P256", "ecdsa-sha2-nistp256"),
        ("ECC_NIST_P384", "ecdsa-sha2-nistp384"),
        ("RSA_2048", "rsassa-pss-sha256"),
    ],
)
def test_what_it_signs_is_verified_without_it(
    spec: str, scheme: str, kms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = yard(tmp_path, new_key(kms, spec))

    envelope = seal(b"{}", signing_key(settings))

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    opened = open_envelope(envelope, WHAT, trusted_keys(settings))
    assert opened.payload == b"{}"
    assert (opened.key.scheme, opened.key.kms_key) == (scheme, settings.signing_kms_key)
    assert not (tmp_path / "keys" / "release-signing.key").exists()


def test_the_public_key_is_fetched_once(
    kms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = yard(tmp_path, new_key(kms))
    first = signing_key(settings)

    monkeypatch.setattr("trainyard.signing.keys.fetch_public_key", None)

    assert signing_key(settings).public == first.public


def test_an_alias_that_moves_is_found_and_its_new_key_is_fetched_when_told(
    kms: Any, tmp_path: Path
) -> None:
    kms.create_alias(AliasName=ALIAS, TargetKeyId=new_key(kms))
    settings = yard(tmp_path, ALIAS)
    old = seal(b"1", signing_key(settings))
    kms.update_alias(AliasName=ALIAS, TargetKeyId=new_key(kms))

    with pytest.raises(BadInput, match="does not verify with its public key") as moved:
        seal(b"2", signing_key(settings))
    assert "trainyard keys add --kms" in moved.value.hint
    added = add_kms_key(settings, ALIAS)
    new = seal(b"2", signing_key(settings))

    trusted = trusted_keys(settings)
    assert open_envelope(old, WHAT, trusted).payload == b"1"
    assert open_envelope(new, WHAT, trusted).key == added
    assert added.comment == f"AWS KMS {ALIAS}"


def test_an_alias_that_moves_back_signs_with_its_first_key_again(kms: Any, tmp_path: Path) -> None:
    alias, first, second = "alias/back", new_key(kms), new_key(kms)
    kms.create_alias(AliasName=alias, TargetKeyId=first)
    settings = yard(tmp_path, alias)
    began = add_kms_key(settings, alias)
    for target in (second, first):
        kms.update_alias(AliasName=alias, TargetKeyId=target)
        added = add_kms_key(settings, alias)

    assert added == began
    assert open_envelope(seal(b"1", signing_key(settings)), WHAT, trusted_keys(settings))


def test_a_key_that_was_retired_under_another_name_stays_so(kms: Any, tmp_path: Path) -> None:
    key, alias = new_key(kms), "alias/again"
    kms.create_alias(AliasName=alias, TargetKeyId=key)
    retired = retire(yard(tmp_path, key), add_kms_key(yard(tmp_path, key), key).key_id)

    with pytest.raises(BadInput, match="that signs here is retired"):
        signing_key(yard(tmp_path, alias))
    with pytest.raises(BadInput, match="was retired"):
        add_kms_key(yard(tmp_path, alias), alias)

    assert trusted_keys(yard(tmp_path, alias)).keys == (retired,)
    end = datetime.now(UTC) + timedelta(days=1)
    assert add_kms_key(yard(tmp_path, alias), alias, not_after=end).not_after == end
    assert signing_key(yard(tmp_path, alias)).public.key_id == retired.key_id


@pytest.mark.parametrize("name", ["alias/absent", "1234abcd-12ab-34cd-56ef-1234567890ab"])
def test_a_key_that_does_not_exist_is_named(name: str, kms: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"AWS KMS key {name} cannot be used") as refused:
        signing_key(yard(tmp_path, name))

    assert "AWS_DEFAULT_REGION" in refused.value.hint


def test_a_key_that_cannot_sign_is_refused(kms: Any, tmp_path: Path) -> None:
    secp256k1 = new_key(kms, "ECC_SECG_P256K1")

    with pytest.raises(BadInput, match="does not sign in a way that is known"):
        signing_key(yard(tmp_path, secp256k1))


def test_without_a_region_the_error_says_so(
    kms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))

    with pytest.raises(BadInput, match="region") as refused:
        signing_key(yard(tmp_path, ALIAS))

    assert "AWS_DEFAULT_REGION" in refused.value.hint


def test_aws_that_cannot_be_reached_is_worth_another_try(
    kms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    with pytest.raises(Transient, match="cannot be used now"):
        signing_key(yard(tmp_path, ALIAS))


def test_refusals_of_aws_are_told_from_passing_trouble(tmp_path: Path) -> None:
    from botocore.exceptions import ClientError

    from trainyard.signing import kms as module

    def answer(code: str) -> ClientError:
        return ClientError({"Error": {"Code": code, "Message": ""}}, "Sign")

    with pytest.raises(BadInput, match="AccessDenied") as denied, module._explained(ALIAS):
        raise answer("AccessDeniedException")
    assert "kms:Sign" in denied.value.hint
    with pytest.raises(Transient, match="ThrottlingException"), module._explained(ALIAS):
        raise answer("ThrottlingException")
