from __future__ import annotations

import fcntl
import io
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.unit.store.flaky import RemoteStore

from trainyard.errors import NotFound, StorageFull
from trainyard.node_cache import cache as cache_module
from trainyard.node_cache.cache import NodeCache
from trainyard.node_cache.records import CachedRelease, Pin
from trainyard.store.fetch import Wanted

NOW = datetime.now(UTC)
LONG_AGO = NOW - timedelta(days=2)


class World:
    """A cache with room for 1,000 bytes, and a store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = RemoteStore(root / "store")
        self.cache = NodeCache(root / "cache", limit_bytes=1000)
        self.wanted: dict[str, list[Wanted]] = {}

    def release(self, number: int, *sizes: int) -> CachedRelease:
        release_id = f"adder-{number:012x}"
        wanted = []
        for index, size in enumerate(sizes):
            key = f"{release_id}/{index}"
            data = bytes([number, index]) * (size // 2)
            wanted.append(Wanted(key, self.store.upload(key, io.BytesIO(data))))
        self.wanted[release_id] = wanted
        return CachedRelease(
            release_id=release_id,
            model="adder",
            files={each.entry.sha256: each.entry.size for each in wanted},
            documents=(f"releases/adder/{release_id}.json",),
            used_at=LONG_AGO,
        )

    def bring(self, release: CachedRelease, cache: NodeCache | None = None) -> int:
        """Restore a release, and return the bytes beyond the limit."""
        cache = cache or self.cache
        with cache.use(release) as over_bytes:
            cache.bring(self.store, self.wanted[release.release_id])
        return over_bytes

    def here(self, release: CachedRelease) -> list[bool]:
        return [self.cache.has(sha256) for sha256 in release.files]

    def age(self, release: CachedRelease, seconds: float) -> None:
        for sha256 in release.files:
            path = self.cache.path(sha256)
            moment = NOW.timestamp() - seconds
            os.utime(path, (moment, path.stat().st_mtime))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def pin(release: CachedRelease, owner: str = "me", folder: Path | None = None) -> Pin:
    return Pin(release_id=release.release_id, owner=owner, since=NOW, folder=folder)


class TestEviction:
    def test_the_least_recently_used_makes_room(self, world: World) -> None:
        first, second, third = (world.release(number, 200, 200) for number in (1, 2, 3))
        world.bring(first)
        world.bring(second)
        world.age(first, 10)
        world.age(second, 20)
        assert world.bring(third) == 0
        assert world.here(first) == [True, True]
        assert world.here(second) == [False, True] or world.here(second) == [True, False]
        assert world.cache.state().bytes == 1000

    def test_a_use_counts_whatever_brought_it(self, world: World) -> None:
        first, second, third = (world.release(number, 400) for number in (1, 2, 3))
        world.bring(first)
        world.bring(second)
        world.age(first, 20)
        world.age(second, 10)
        world.bring(first)
        world.bring(third)
        assert world.here(first) == [True]
        assert world.here(second) == [False]

    def test_what_is_pinned_stays_and_growing_is_told(self, world: World) -> None:
        first, second = world.release(1, 800), world.release(2, 400)
        world.bring(first)
        world.cache.pin(pin(first))
        assert world.bring(second) == 200
        assert world.here(first) == [True]
        assert world.here(second) == [True]

    def test_a_pin_that_is_taken_back_holds_nothing(self, world: World) -> None:
        first, second = world.release(1, 800), world.release(2, 400)
        world.bring(first)
        world.cache.pin(pin(first))
        world.cache.pin(pin(first, "another"))
        assert world.cache.unpin("me") == 1
        assert world.bring(second) == 200
        assert world.cache.unpin("another", first.release_id) == 1
        assert world.cache.unpin("another") == 0
        world.cache.evict(1000)
        assert world.here(first) == [False]

    def test_a_pin_ends_with_its_folder(self, world: World) -> None:
        first = world.release(1, 800)
        world.bring(first)
        folder = world.root / "pod"
        folder.mkdir()
        world.cache.pin(pin(first, folder=folder))
        assert world.cache.evict(0).over_bytes == 800
        folder.rmdir()
        assert world.cache.evict(0).bytes_after == 0
        assert world.cache.state().pins == ()

    def test_what_a_folder_links_to_stays(self, world: World) -> None:
        first = world.release(1, 800)
        world.bring(first)
        link = world.root / "served"
        (sha256,) = first.files
        link.hardlink_to(world.cache.path(sha256))
        assert world.cache.evict(0).over_bytes == 800
        assert world.cache.state().linked == {sha256}
        link.unlink()
        assert world.cache.evict(0).over_bytes == 0
        assert world.here(first) == [False]

    def test_what_a_restore_needs_stays(self, world: World) -> None:
        first = world.release(1, 800)
        world.bring(first)
        with world.cache.use(first):
            assert world.cache.evict(0).over_bytes == 800
        assert world.cache.evict(0).remove == tuple(first.files)

    def test_room_is_made_for_everybody_at_once(self, world: World) -> None:
        first, second = world.release(1, 600), world.release(2, 600)
        with world.cache.use(first) as alone, world.cache.use(second) as together:
            assert (alone, together) == (0, 200)

    def test_a_dead_restore_holds_nothing(self, world: World) -> None:
        first = world.release(1, 800)
        world.bring(first)
        session = world.cache.root / "sessions" / "1-dead.json"
        session.write_text(
            f'{{"release_id": "x", "pid": 1, "since": "2026-01-01T00:00:00Z", '
            f'"files": {{"{next(iter(first.files))}": 800}}}}'
        )
        assert world.cache.evict(0).over_bytes == 0
        assert not session.exists()

    def test_a_live_one_of_another_process_does(self, world: World) -> None:
        first = world.release(1, 800)
        world.bring(first)
        session = world.cache.root / "sessions" / "1-live.json"
        session.write_text(
            f'{{"release_id": "x", "pid": 1, "since": "2026-01-01T00:00:00Z", '
            f'"files": {{"{next(iter(first.files))}": 800}}}}'
        )
        with session.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert world.cache.evict(0).over_bytes == 800
            assert session.exists()

    def test_what_nobody_will_finish_goes_first(self, world: World) -> None:
        first = world.release(1, 800)
        world.bring(first)
        left = world.cache.root / "partial" / ("0" * 64)
        left.write_bytes(bytes(100_000))
        left.with_name(f"{left.name}.parts").write_bytes(b"")
        world.cache.evict(1000)
        assert list((world.cache.root / "partial").iterdir()) == []
        assert world.here(first) == [True]

    def test_a_release_of_which_nothing_is_left_is_forgotten(self, world: World) -> None:
        first, second = world.release(1, 800), world.release(2, 100)
        world.bring(first)
        world.bring(second)
        document = world.cache.documents / first.documents[0]
        document.parent.mkdir(parents=True)
        document.write_text("{}")
        world.age(first, 10)
        world.cache.evict(100)
        assert [each.release_id for each in world.cache.state().releases] == [second.release_id]
        assert not document.exists()

    def test_a_release_that_is_about_to_be_restored_is_not(self, world: World) -> None:
        first, second = world.release(1, 800), world.release(2, 100)
        world.bring(first)
        coming = second.model_copy(update={"used_at": datetime.now(UTC)})
        world.cache.remember(coming)
        world.cache.evict(0)
        assert [each.release_id for each in world.cache.state().releases] == [second.release_id]


class TestUse:
    def test_without_a_limit_everything_stays(self, world: World) -> None:
        cache = NodeCache(world.root / "cache")
        for number in (1, 2, 3):
            assert world.bring(world.release(number, 800), cache) == 0
        assert cache.state().bytes == 2400

    def test_a_disk_without_room_is_refused_before_anything_moves(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = world.release(1, 800)
        real = os.statvfs(world.root)
        full = os.statvfs_result((real.f_bsize, 1, real.f_blocks, 700, 700, *real[5:]))
        monkeypatch.setattr(cache_module.os, "statvfs", lambda path: full)
        with pytest.raises(StorageFull, match=r"needs 0\.00 GiB more"):
            world.bring(first)
        assert world.store.asked == []
        assert list((world.cache.root / "sessions").iterdir()) == []

    def test_only_what_was_restored_can_be_pinned(self, world: World) -> None:
        with pytest.raises(NotFound, match="is not in the cache"):
            world.cache.pin(pin(world.release(1, 10)))

    def test_a_second_restore_waits_for_the_first_and_uses_its_files(self, world: World) -> None:
        first = world.release(1, 400, 400)
        threads = [threading.Thread(target=world.bring, args=(first,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert world.here(first) == [True, True]
        assert world.store.read_bytes == 800

    def test_files_are_read_only(self, world: World) -> None:
        first = world.release(1, 400)
        world.bring(first)
        (sha256,) = first.files
        assert world.cache.path(sha256).stat().st_mode & 0o222 == 0

    def test_a_broken_record_is_none(self, world: World) -> None:
        first = world.release(1, 400)
        world.bring(first)
        (world.cache.root / "pins" / "broken.json").write_text("{")
        (world.cache.root / "releases" / "broken.json").write_text("\xff")
        state = world.cache.state()
        assert len(state.releases) == 1
        assert state.pins == ()
