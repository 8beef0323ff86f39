"""Where an S3 store is, how it is spoken to, and the client that does."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from trainyard.errors import BadInput
from trainyard.names import check_relative_path
from trainyard.settings import Settings
from trainyard.store.s3_errors import explained

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
_CONNECT_TIMEOUT_S = 10.0
_CONNECTIONS = 64

_making = threading.Lock()


@dataclass(frozen=True)
class AwsCredentials:
    """Credentials from elsewhere than boto3's own chain."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)
    region: str = ""


@dataclass(frozen=True)
class S3Place:
    """A bucket and the folder in it that is the store."""

    bucket: str
    prefix: str
    """Without slashes at its ends; may be empty."""

    @classmethod
    def parse(cls, url: str) -> S3Place:
        """Read `s3://bucket/prefix`. Raises BadInput."""
        parts = urlsplit(url)
        if parts.scheme != "s3" or parts.query or parts.fragment:
            raise BadInput(f"{url!r} is no S3 URL.", hint="Write it as s3://bucket/prefix.")
        if not _BUCKET.match(parts.netloc):
            raise BadInput(
                f"{parts.netloc!r} in TRAINYARD_STORE is no name of a bucket.",
                hint="Write the store as s3://bucket/prefix; credentials and endpoint have "
                "settings of their own.",
            )
        prefix = parts.path.strip("/")
        return cls(parts.netloc, check_relative_path(prefix) if prefix else "")

    @property
    def url(self) -> str:
        """The place as a URL."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def make_client(settings: Settings, credentials: AwsCredentials | None = None) -> Any:
    """Return boto3's S3 client for these settings.

    Retries are botocore's own (`standard`: 5xx, throttling, cut connections, timeouts).

    Raises:
        BadInput: profile, region or endpoint cannot be used.
    """
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=min(_CONNECT_TIMEOUT_S, settings.s3_timeout_s),
        read_timeout=settings.s3_timeout_s,
        retries={"mode": "standard", "total_max_attempts": settings.s3_attempts},
        max_pool_connections=_CONNECTIONS,
        s3={
            "addressing_style": settings.s3_addressing_style,
            # Every write carries a checksum that S3 verifies. Without TLS botocore would hash all
            # of it once more for the signature, which protects nothing there: answers have none.
            "payload_signing_enabled": False,
        },
    )
    known: dict[str, str] = {}
    if credentials is not None:
        known = {
            "aws_access_key_id": credentials.access_key_id,
            "aws_secret_access_key": credentials.secret_access_key,
            "aws_session_token": credentials.session_token,
        }
    region = settings.s3_region or (credentials.region if credentials else "")
    # Making clients, unlike using them, is not safe for several threads.
    with explained("use", settings.store), _making:
        try:
            session = boto3.session.Session(
                profile_name=settings.s3_profile or None,
                region_name=region or None,
                **{name: value for name, value in known.items() if value},
            )
            return session.client(
                "s3", endpoint_url=settings.s3_endpoint_url or None, config=config
            )
        except ValueError as error:
            raise BadInput(
                f"TRAINYARD_S3_ENDPOINT_URL cannot be used: {error}.",
                hint="Write it as https://host:port.",
            ) from error
