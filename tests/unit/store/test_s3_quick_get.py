"""Ranges of objects are read with less ado, and as reliably as by boto3's own calls."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fast_fake_s3 import Connection, Request, Server

from trainyard.errors import BadInput, NotFound
from trainyard.settings import Settings
from trainyard.store.s3 import S3Store

DATA = os.urandom(300_000)


class Moody(Server):
    """Answers as it is told, and remembers how it was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[dict[str, str]] = []
        self.refuse = 0
        """Reads to refuse with 403."""
        self.cut = 0
        """Reads to cut in the middle."""

    def answer(self, connection: Connection, request: Request) -> None:
        self.asked.append(request.headers)
        if self.refuse:
            self.refuse -= 1
            self._error(connection, "403 Forbidden", "AccessDenied")
        elif self.cut:
            self.cut -= 1
            head = 'HTTP/1.1 206 Partial Content\r\nETag: "x"\r\nContent-Length: 300000\r\n\r\n'
            connection.sock.sendall(head.encode() + DATA[:1000])
            connection.sock.shutdown(socket.SHUT_RDWR)
        else:
            super().answer(connection, request)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Moody, int]]:
    place = tmp_path / "seed" / "yard" / "a b"
    place.mkdir(parents=True)
    (place / "c+d.bin").write_bytes(DATA)
    (place / "e").write_bytes(b"0123456789")
    moody = Moody(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    threading.Thread(target=Connection(moody, sock).serve, daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield moody, listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def store(server: tuple[Moody, int], monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    settings = Settings(
        store="s3://yard",
        s3_endpoint_url=f"http://127.0.0.1:{server[1]}",
        s3_region="us-east-1",
        s3_addressing_style="path",
        s3_attempts=3,
        s3_expected_bucket_owner="123456789012",
    )
    return S3Store(settings)


def read(store: S3Store, key: str = "a b/c+d.bin", start: int = 0, size: int = 300_000) -> bytes:
    with store.open_range(key, start, size) as stream:
        return stream.read()


def is_quick(headers: dict[str, str]) -> bool:
    """boto3's own calls name themselves."""
    return "boto" not in headers.get("user-agent", "").lower()


@pytest.fixture
def warm(store: S3Store, server: tuple[Moody, int]) -> S3Store:
    """A store that boto3 has read once."""
    assert read(store, size=10) == DATA[:10]
    assert not is_quick(server[0].asked[-1])
    return store


def test_after_the_first_read_the_others_are_quick(
    warm: S3Store, server: tuple[Moody, int]
) -> None:
    assert read(warm) == DATA
    assert read(warm, start=5, size=7) == DATA[5:12]
    assert read(warm, "a b/e", start=8, size=5) == b"89"
    quick = server[0].asked[1:]
    assert all(map(is_quick, quick))
    for headers in quick:
        assert headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=key/")
        assert headers["x-amz-expected-bucket-owner"] == "123456789012"


def test_what_does_not_exist(warm: S3Store) -> None:
    with pytest.raises(NotFound, match="a b/none"):
        read(warm, "a b/none")
    assert read(warm, "a b/e", start=20, size=5) == b""
    assert read(warm) == DATA


def test_a_cut_answer_goes_on_where_it_was_cut(warm: S3Store, server: tuple[Moody, int]) -> None:
    server[0].cut = 1
    server[0].objects["yard/a b/c+d.bin"].etag = '"x"'
    assert read(warm) == DATA


def test_connections_are_used_again(warm: S3Store, server: tuple[Moody, int]) -> None:
    for start in range(20):
        read(warm, start=start, size=100)
    before = threading.active_count()
    for start in range(20):
        assert read(warm, start=start, size=100) == DATA[start : start + 100]
    # The server has a thread for each connection.
    assert threading.active_count() <= before


@pytest.mark.parametrize("refused", ["a b/none", "secret"])
def test_what_boto3_may_not_read_either_is_no_fault_of_the_quick_way(
    warm: S3Store, server: tuple[Moody, int], refused: str
) -> None:
    for _ in range(4):
        server[0].refuse = 2 if refused == "secret" else 0
        with pytest.raises((BadInput, NotFound)):
            read(warm, refused)
    server[0].asked.clear()
    assert read(warm) == DATA
    assert [is_quick(headers) for headers in server[0].asked] == [True]


@pytest.mark.parametrize("error", [TypeError("one argument more"), KeyError("x"), OSError("y")])
def test_whatever_breaks_inside_is_said_once_and_boto3_reads(
    warm: S3Store,
    server: tuple[Moody, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(warm._bucket.quick, "_send", broken)
    server[0].asked.clear()
    with caplog.at_level(logging.INFO, logger="trainyard.store.s3_quick_get"):
        for _ in range(5):
            assert read(warm) == DATA
    assert [is_quick(headers) for headers in server[0].asked] == [False] * 5
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_store_that_wants_it_differently_is_asked_by_boto3(
    warm: S3Store, server: tuple[Moody, int]
) -> None:
    for _ in range(3):
        server[0].refuse = 1
        assert read(warm) == DATA
    server[0].asked.clear()
    assert read(warm) == DATA
    assert [is_quick(headers) for headers in server[0].asked] == [False]
