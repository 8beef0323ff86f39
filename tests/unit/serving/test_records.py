"""Records: whole or absent, checked names, one holder."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from tests.serving_world import ENVIRONMENT, NEW, observed

from trainyard.errors import BadInput, Busy
from trainyard.serving.records import (
    LOOPBACK,
    ObservedServer,
    ProxyRecord,
    ServingPaths,
    bind_port,
    choose_port,
    is_held,
    observed_servers,
    only_one,
    proxy_url,
    read_record,
    write_record,
)
from trainyard.settings import Settings


@pytest.fixture
def paths(tmp_path: Path) -> ServingPaths:
    return ServingPaths.of(Settings(home=tmp_path))


def test_a_record_reads_back_as_written(paths: ServingPaths) -> None:
    server = observed(NEW, state="starting", port=20001, cache_before=("a", "b"))
    write_record(paths.observed(ENVIRONMENT, server.name), server)
    assert observed_servers(paths) == [server]
    assert server.url == "http://127.0.0.1:20001"


def test_a_failed_write_leaves_the_old_record_and_no_litter(
    paths: ServingPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = paths.observed(ENVIRONMENT, "x")
    old = observed(NEW)
    write_record(path, old)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_record(path, observed(NEW, state="failed"))
    assert read_record(path, ObservedServer) == old
    assert [each.name for each in path.parent.iterdir()] == ["x.json"]


def test_records_that_make_no_sense_are_ignored(
    paths: ServingPaths, caplog: pytest.LogCaptureFixture
) -> None:
    path = paths.observed(ENVIRONMENT, "x")
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "x", "strange": 1}')
    assert observed_servers(paths) == []
    assert "is not a ObservedServer" in caplog.text


def test_what_this_user_may_not_read_is_named(
    paths: ServingPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not taken for what is not there: a driver is, and servers are."""

    def forbidden(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    write_record(paths.proxy, ProxyRecord(port=20002, socket="/s", pid=1, epoch="e"))
    for broken, question in (
        ("pathlib.Path.read_bytes", lambda: read_record(paths.proxy, ProxyRecord)),
        ("os.scandir", lambda: observed_servers(paths)),
        ("pathlib.Path.open", lambda: is_held(paths.agent_lock)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(broken, forbidden)
            with pytest.raises(BadInput) as told:
                question()
        assert str(paths.run) in told.value.message
        assert "as the user who runs" in told.value.hint


@pytest.mark.parametrize("name", ["..", "a/b", "", "A"])
def test_names_from_outside_stay_in_their_folder(paths: ServingPaths, name: str) -> None:
    with pytest.raises(BadInput):
        paths.desired(name, NEW)
    with pytest.raises(BadInput):
        paths.lease(ENVIRONMENT, name)


def test_there_is_only_one_holder_of_a_lock(paths: ServingPaths) -> None:
    assert not is_held(paths.agent_lock)
    with only_one(paths.agent_lock, "agent"):
        assert is_held(paths.agent_lock)
        with pytest.raises(Busy, match=f"Another agent .*pid {os.getpid()}"):
            only_one(paths.agent_lock, "agent").__enter__()
    assert not is_held(paths.agent_lock)


def test_a_port_in_use_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    used, avoided, free = (choose_port() for _ in range(3))
    with bind_port(used) as sock:
        sock.listen()
        monkeypatch.setattr("random.sample", lambda ports, k: [used, avoided, free])
        assert choose_port(avoid=frozenset({avoided})) == free
        with socket.create_connection((LOOPBACK, used)):
            pass


def test_the_proxys_url_comes_from_its_record(tmp_path: Path, paths: ServingPaths) -> None:
    settings = Settings(home=tmp_path)
    assert proxy_url(settings) is None
    write_record(paths.proxy, ProxyRecord(port=20002, socket="/s", pid=1, epoch="e"))
    assert proxy_url(settings) == "http://127.0.0.1:20002"


def test_a_process_is_known_by_pid_and_start(tmp_path: Path) -> None:
    assert not observed(NEW).alive
    assert not observed(NEW, pid=os.getpid(), process_started=1.0, port=1).alive
