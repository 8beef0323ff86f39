"""The copy of a cluster's objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster, Fault
from tests.serving_world import eventually

from trainyard.kubernetes.kinds import HTTP_ROUTE, POD
from trainyard.kubernetes.mirror import Mirror


@pytest.fixture
def fake() -> Iterator[FakeCluster]:
    with FakeCluster.running() as fake:
        yield fake


@pytest.fixture
def mirror(fake: FakeCluster) -> Iterator[Mirror]:
    made = Mirror(fake.client(), POD, NS, labels={"app": "x"}, watch_s=2)
    yield made
    made.stop()


def pod(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels or {"app": "x"}}}


def names(mirror: Mirror) -> set[str]:
    return set(mirror.objects)


def test_changes_are_seen_as_they_come(fake: FakeCluster, mirror: Mirror) -> None:
    fake.put(POD, pod("a"))
    fake.put(POD, pod("other", app="y"))
    assert not mirror.synced
    mirror.start()
    eventually(lambda: names(mirror) == {"a"})
    eventually(lambda: fake.open_watches == 1)
    listed = fake.log.count(("list", "pods", ""))
    fake.put(POD, pod("b"))
    eventually(lambda: names(mirror) == {"a", "b"})
    fake.edit(POD, "b", lambda body: body.update(status={"podIP": "10.0.0.1"}))
    eventually(lambda: mirror.objects["b"].get("status") == {"podIP": "10.0.0.1"})
    fake.remove(POD, "a")
    eventually(lambda: names(mirror) == {"b"})
    assert fake.log.count(("list", "pods", "")) == listed


def test_a_watch_that_is_cut_or_too_old_loses_nothing(fake: FakeCluster, mirror: Mirror) -> None:
    mirror.start()
    eventually(lambda: fake.open_watches == 1)
    fake.down = True
    fake.cut_watches()
    fake.put(POD, pod("a"))
    fake.forget_history()
    eventually(lambda: fake.open_watches == 0)
    fake.down = False
    eventually(lambda: names(mirror) == {"a"})


def test_without_watches_it_lists_again_and_again(fake: FakeCluster, mirror: Mirror) -> None:
    fake.faults.append(Fault("watch", "pods", 403, "Forbidden", "no right to watch"))
    mirror.start()
    eventually(lambda: mirror.synced)
    fake.put(POD, pod("a"))
    eventually(lambda: names(mirror) == {"a"})


def test_the_copy_stays_while_the_server_is_away(fake: FakeCluster, mirror: Mirror) -> None:
    fake.put(POD, pod("a"))
    mirror.start()
    eventually(lambda: mirror.synced)
    fake.down = True
    fake.cut_watches()
    eventually(lambda: mirror.age_s > 0.3)
    assert names(mirror) == {"a"}


def test_a_kind_that_is_missing_is_waited_for(fake: FakeCluster) -> None:
    kinds = dict(fake.kinds)
    fake.uninstall(HTTP_ROUTE)
    mirror = Mirror(fake.client(), HTTP_ROUTE, NS).start()
    eventually(lambda: len(fake._requests) > 1)
    assert not mirror.synced
    fake.kinds = kinds
    eventually(lambda: mirror.synced)
    mirror.stop()


def test_an_answer_that_nobody_foresaw_does_not_end_the_copying(
    fake: FakeCluster, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = mirror._cluster.list

    def once(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(mirror._cluster, "list", listed)
        raise KeyError("metadata")

    monkeypatch.setattr(mirror._cluster, "list", once)
    fake.put(POD, pod("a"))
    mirror.start()
    eventually(lambda: names(mirror) == {"a"})
