"""Who asks a Prometheus proves it, and tells nobody how."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.fake_prometheus import FakePrometheus, fake_prometheus
from tests.unit.rollout.machine import NEW, NOW

from trainyard.errors import BadInput
from trainyard.rollout.readers.prometheus import PrometheusReader
from trainyard.rollout.readers.signing import read_token
from trainyard.serving.process import free_port
from trainyard.serving.protocol import ServerStatus
from trainyard.spec.metrics import MetricsSource

SERVER = ServerStatus(f"{NEW}-0", NEW, "ready", "", NOW - timedelta(hours=1), 0, "")
TOKEN = "a-token-nobody-may-see"


@pytest.fixture
def fake() -> Iterator[FakePrometheus]:
    with fake_prometheus() as served:
        served.add(
            NOW.timestamp() - 5, "vllm:request_success_total", 4, pod=SERVER.name, release=NEW
        )
        yield served


def source(fake: FakePrometheus, **more: Any) -> MetricsSource:
    return MetricsSource.model_validate({"source": "prometheus", "url": fake.url, **more})


def read(fake: FakePrometheus, **more: Any) -> int:
    one = PrometheusReader(source(fake, **more), version_of=lambda _: None, now=lambda: NOW)
    return len(one.read("production", [SERVER]))


def test_without_auth_nothing_is_sent(fake: FakePrometheus) -> None:
    assert read(fake) == 1
    assert "Authorization" not in fake.asked[0].headers


def test_a_token_comes_from_the_environment(
    fake: FakePrometheus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_METRICS_TOKEN", TOKEN)
    assert read(fake, auth="bearer") == 1
    assert fake.asked[0].headers["Authorization"] == f"Bearer {TOKEN}"


def test_a_token_file_is_read_anew_for_each_request(fake: FakePrometheus, tmp_path: Path) -> None:
    file = tmp_path / "token"
    for token in ("first", "second"):
        file.write_text(f"{token}\n")
        assert read(fake, auth="bearer", token_file=str(file)) == 1
        assert fake.asked[-1].headers["Authorization"] == f"Bearer {token}"


def test_without_a_token_nothing_is_asked(
    fake: FakePrometheus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("TRAINYARD_METRICS_TOKEN", raising=False)
    with caplog.at_level(logging.WARNING):
        assert read(fake, auth="bearer") == 0
        assert read(fake, auth="bearer", token_file=str(tmp_path / "none")) == 0
    assert fake.asked == []
    assert "TRAINYARD_METRICS_TOKEN holds no token" in caplog.text


@pytest.mark.parametrize("text", ["", "two words", "two\nlines", "schlüssel"])
def test_what_is_no_token_is_refused_without_showing_it(
    fake: FakePrometheus, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "token"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        read_token(source(fake, auth="bearer", token_file=str(file)))
    assert not text or text not in str(caught.value)


def test_a_token_is_in_no_log(
    fake: FakePrometheus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRAINYARD_METRICS_TOKEN", TOKEN)
    fake.status = 401
    with caplog.at_level(logging.DEBUG):
        assert read(fake, auth="bearer") == 0
    assert "401" in caplog.text
    assert TOKEN not in caplog.text


def test_amazon_gets_its_signature(fake: FakePrometheus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert read(fake, auth="sigv4", region="eu-central-1") == 1
    (asked,) = fake.asked
    signature = asked.headers["Authorization"]
    assert re.match(
        r"AWS4-HMAC-SHA256 Credential=AKIAEXAMPLE/\d{8}/eu-central-1/aps/aws4_request, ", signature
    )
    assert "host" in signature.split("SignedHeaders=")[1].split(",")[0]
    assert asked.headers["X-Amz-Security-Token"] == "session"
    assert "example" not in signature.replace("AKIAEXAMPLE", "")


def test_the_signature_is_over_the_body_that_is_sent(
    fake: FakePrometheus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verifier that knows the secret computes the same signature from what arrived."""
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert read(fake, auth="sigv4", region="eu-central-1") == 1
    (asked,) = fake.asked
    signed = asked.headers["Authorization"].split("SignedHeaders=")[1].split(",")[0].split(";")
    lower = {name.lower(): text for name, text in asked.headers.items()}
    again = AWSRequest(
        "POST",
        f"{fake.url}/api/v1/query",
        data=asked.body,
        headers={name: lower[name] for name in signed if name not in ("host", "x-amz-date")},
    )
    again.context["timestamp"] = lower["x-amz-date"]
    signer = SigV4Auth(Credentials("AKIAEXAMPLE", "example"), "aps", "eu-central-1")
    again.headers["X-Amz-Date"] = lower["x-amz-date"]
    canonical = signer.canonical_request(again)
    assert hashlib.sha256(asked.body).hexdigest() in canonical
    expected = signer.signature(signer.string_to_sign(again, canonical), again)
    assert asked.headers["Authorization"].endswith(f"Signature={expected}")


def configure_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leave botocore neither credentials nor a region."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_REGION",
                 "AWS_DEFAULT_REGION"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))


def test_without_credentials_or_region_nothing_is_asked(
    fake: FakePrometheus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configure_nothing(monkeypatch, tmp_path)
    assert read(fake, auth="sigv4", region="eu-central-1") == 0
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example")
    assert read(fake, auth="sigv4") == 0
    assert fake.asked == []


def test_while_nobody_gives_credentials_the_source_is_away(
    fake: FakePrometheus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a pod whose role is asked for with a web identity, in an outage of STS."""
    token = tmp_path / "token"
    token.write_text("a.web.identity")
    configure_nothing(monkeypatch, tmp_path)
    for name, value in {
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/trainyard",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
        "AWS_ENDPOINT_URL_STS": f"http://127.0.0.1:{free_port()}",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert read(fake, auth="sigv4", region="eu-central-1") == 0
    assert fake.asked == []
