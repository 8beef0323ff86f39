"""The guard's threads beside the cluster's API go on, whatever a look fails with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.serving_world import ENVIRONMENT, MODEL, eventually, make_channel, put_channel

from trainyard.kubernetes.client import Object
from trainyard.serving.kubernetes.arrivals import DataPlaneSight
from trainyard.serving.kubernetes.guard_feed import StoreFeed, TrafficFeed, Watched
from trainyard.store.folder import FolderStore
from trainyard.store.protocol import Store

CHANNEL = (ENVIRONMENT, MODEL)


class SometimesBroken:
    """A data plane that fails at every other look in a way that nobody foresaw."""

    looks = 0

    def look(self, environment: str, model: str, route: Object) -> DataPlaneSight | None:
        self.looks += 1
        if self.looks % 2 == 0:
            raise KeyError("labels")
        return DataPlaneSight("epoch", {})


def test_traffic_is_asked_for_again_after_any_failure() -> None:
    data_plane, feed = SometimesBroken(), TrafficFeed(interval_s=0.01)
    feed.want({CHANNEL: Watched({}, data_plane)})
    feed.look()
    assert feed.sight(CHANNEL) == DataPlaneSight("epoch", {})
    feed.look()
    assert feed.sight(CHANNEL) is None
    feed.start()
    try:
        eventually(lambda: data_plane.looks > 6 and feed.sight(CHANNEL))
    finally:
        feed.stop()


def test_the_store_is_read_again_after_any_failure(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    put_channel(store, make_channel(weight=10))
    failures: list[Any] = [KeyError("store"), AttributeError("store")]

    def open_store() -> Store:
        if failures:
            raise failures.pop()
        return store

    feed = StoreFeed(open_store, interval_s=0.01).start()
    try:
        eventually(lambda: CHANNEL in feed.wishes.by_channel)
    finally:
        feed.stop()
