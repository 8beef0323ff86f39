"""A fake of S3 for tests: moto in server mode, behind the proxy that completes and breaks it."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faulty_proxy import FaultyProxy

from trainyard.settings import Settings
from trainyard.store.s3 import S3Store
from trainyard.store.s3_client import AwsCredentials, make_client
from trainyard.store.s3_probe import RECORD_KEY

FAST = {
    "s3_addressing_style": "path",
    "s3_region": "us-east-1",
    "s3_part_bytes": 5 << 20,
}

OF_THE_CLIENT = {"s3_timeout_s", "s3_attempts"}
"""Settings that a client is made with."""

MOTO = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
# Its input ends with the process that started it.
sys.stdin.read()
server.stop()
"""

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "fake",
    "AWS_SECRET_ACCESS_KEY": "fake",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
"""What a client needs; no profile of the developer's is looked at."""


class FakeS3:
    """A running fake."""

    def __init__(self, proxy: FaultyProxy, moto_url: str) -> None:
        """Use servers that run."""
        self.proxy = proxy
        self.moto_url = moto_url
        self.client = self._client(moto_url)
        """A client that speaks to the fake itself, past the proxy."""
        self._through_proxy = self._client(proxy.url)

    def new_bucket(self) -> str:
        """Make a bucket and return its name."""
        name = f"yard-{secrets.token_hex(6)}"
        self.client.create_bucket(Bucket=name)
        return name

    def place(self) -> dict[str, str]:
        """Return a new bucket of the fake, and where another process reaches it past the proxy."""
        return {"bucket": self.new_bucket(), "url": self.moto_url}

    @staticmethod
    def _client(url: str) -> Any:
        settings = Settings(store="s3://bucket", s3_endpoint_url=url, **FAST)
        return make_client(settings, AwsCredentials("fake", "fake"))

    def settings(self, home: Path, url: str, **changes: Any) -> Settings:
        """Return settings for the store at `url`."""
        values = {"home": home, "store": url, "s3_endpoint_url": self.proxy.url, **FAST, **changes}
        return Settings(**values)

    def store(
        self, home: Path, *, prefix: str = "yard", probed: bool = True, **changes: Any
    ) -> S3Store:
        """Return an empty store in a new bucket.

        `probed`: it is taken for one that has shown that its conditions hold. Making a client takes
        botocore half a second, so stores share one unless their settings are the client's.
        """
        url = f"s3://{self.new_bucket()}/{prefix}".rstrip("/")
        store = S3Store(self.settings(home, url, **changes))
        store._probed = probed
        if not changes.keys() & OF_THE_CLIENT:
            store._bucket._client = self._through_proxy
        return store


def record_of(store: S3Store) -> tuple[str, str]:
    """Return bucket and name of the record that a store was probed."""
    place = store._bucket.place
    return place.bucket, store._bucket.name(RECORD_KEY)


@contextmanager
def fake_s3() -> Iterator[FakeS3]:
    """Run a fake of S3 on loopback."""
    server = subprocess.Popen(
        [sys.executable, "-c", MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with server:
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline())
            with FaultyProxy(("127.0.0.1", port)) as proxy:
                yield FakeS3(proxy, f"http://127.0.0.1:{port}")
        finally:
            server.kill()
