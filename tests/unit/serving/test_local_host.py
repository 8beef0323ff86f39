"""The local host: wishes out, servers in."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from tests.serving_world import ENVIRONMENT, MODEL, make_release, observed

from trainyard.errors import BadInput, NotFound
from trainyard.serving.agent import remove_servers
from trainyard.serving.local_host import LocalHost
from trainyard.serving.records import (
    DesiredServers,
    ServingPaths,
    desired_servers,
    only_one,
    write_record,
)
from trainyard.settings import Settings
from trainyard.store.folder import FolderStore


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def paths(settings: Settings) -> ServingPaths:
    return ServingPaths.of(settings)


def wishes(paths: ServingPaths) -> list[DesiredServers]:
    return desired_servers(paths)


def test_the_same_wish_again_changes_nothing(settings: Settings, paths: ServingPaths) -> None:
    host, release = LocalHost(settings), make_release(settings, FolderStore(settings.store_root))
    host.deploy(ENVIRONMENT, release, 2)
    first = wishes(paths)
    host.deploy(ENVIRONMENT, release, 2)
    assert wishes(paths) == first
    host.deploy(ENVIRONMENT, release, 1)
    assert [wish.replicas for wish in wishes(paths)] == [1]
    host.remove(ENVIRONMENT, release.release_id)
    host.remove(ENVIRONMENT, release.release_id)
    assert wishes(paths) == []


def test_fewer_than_no_servers_are_refused(settings: Settings) -> None:
    release = make_release(settings, FolderStore(settings.store_root))
    with pytest.raises(BadInput, match="-1 servers"):
        LocalHost(settings).deploy(ENVIRONMENT, release, -1)


def test_a_wish_shows_at_once_and_says_who_is_missing(
    settings: Settings, paths: ServingPaths
) -> None:
    host, release = LocalHost(settings), make_release(settings, FolderStore(settings.store_root))
    host.deploy(ENVIRONMENT, release, 2)
    servers = host.servers(ENVIRONMENT, MODEL)
    assert [(s.name, s.release_id, s.state) for s in servers] == [
        (f"{release.release_id}-{n}", release.release_id, "starting") for n in (0, 1)
    ]
    assert "agent does not run" in servers[0].message
    with only_one(paths.agent_lock, "agent"):
        assert "not begun" in host.servers(ENVIRONMENT, MODEL)[0].message
    assert host.servers("production", MODEL) == []


def test_a_process_that_is_gone_is_not_ready(settings: Settings, paths: ServingPaths) -> None:
    release = make_release(settings, FolderStore(settings.store_root))
    started = psutil.Process().create_time()
    here = observed(release.release_id, 0, pid=os.getpid(), process_started=started, port=20001)
    gone = observed(release.release_id, 1, pid=os.getpid(), process_started=1.0, port=20002)
    for record in (here, gone):
        write_record(paths.observed(ENVIRONMENT, record.name), record)
    first, second = LocalHost(settings).servers(ENVIRONMENT, MODEL)
    assert (first.state, first.url) == ("ready", "http://127.0.0.1:20001")
    assert second.state == "unhealthy"
    assert "process is gone" in second.message


def test_all_wishes_of_a_model_can_be_taken_back(settings: Settings, paths: ServingPaths) -> None:
    host, store = LocalHost(settings), FolderStore(settings.store_root)
    releases = [make_release(settings, store, revision) for revision in ("v1", "v2")]
    for release in releases:
        host.deploy(ENVIRONMENT, release, 1)
    host.deploy("production", releases[0], 1)
    remove_servers(settings, ENVIRONMENT, MODEL)
    assert [wish.environment for wish in wishes(paths)] == ["production"]


def test_nothing_is_adopted_or_scaled_by_others_on_this_machine(
    settings: Settings, paths: ServingPaths
) -> None:
    host = LocalHost(settings)
    with pytest.raises(NotFound, match="no servers in staging that somebody else deployed"):
        host.scale(ENVIRONMENT, "adder-0123456789ab", 1)
    host.hold_autoscaling(ENVIRONMENT, MODEL)
    host.resume_autoscaling(ENVIRONMENT, MODEL, "adder-0123456789ab")
    assert wishes(paths) == []
