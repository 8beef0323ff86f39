"""Reading a source in ranges: what is tried again, and what ends it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, cast

import pytest

from trainyard.errors import BadInput, NotFound, Transient
from trainyard.sources.protocol import ResolvedRevision, SourceFile
from trainyard.steps.fetching import PAUSES_S, Surroundings, ranges_of
from trainyard.store.parts import Ranges

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

DATA = bytes(range(250)) * 10


class FlakySource:
    """Gives at most `step` bytes, then fails as it was told."""

    def __init__(self, *failures: Exception | None, step: int = 1000) -> None:
        self.failures = list(failures)
        self.step = step
        self.asked: list[tuple[int, int]] = []

    def resolve(self, revision: str | None) -> ResolvedRevision:
        raise NotImplementedError

    def open(self, resolved: ResolvedRevision, path: str) -> BinaryIO:
        raise NotImplementedError

    def open_range(self, resolved: ResolvedRevision, path: str, start: int, size: int) -> BinaryIO:
        self.asked.append((start, size))
        failure = self.failures.pop(0) if self.failures else None
        if failure is None:
            return io.BytesIO(DATA[start : start + size])
        return cast(BinaryIO, Breaking(DATA[start : start + min(size, self.step)], failure))


class Breaking(io.BytesIO):
    def __init__(self, data: bytes, failure: Exception) -> None:
        super().__init__(data)
        self.failure = failure

    def readinto(self, buffer: Buffer, /) -> int:
        count = super().readinto(buffer)
        if not count:
            raise self.failure
        return count


class World:
    def __init__(self, source: FlakySource) -> None:
        self.read_bytes = 0
        self.slept: list[float] = []
        self.said: list[str] = []
        file = SourceFile("model.safetensors", len(DATA))
        resolved = ResolvedRevision("v1", "file:models", (file,), "print")
        self.ranges: Ranges = ranges_of(
            source,
            resolved,
            file,
            Surroundings(
                on_read=self.count,
                sleep=self.slept.append,
                say=self.said.append,
                too_short=lambda: BadInput("changed"),
            ),
        )

    def count(self, size: int) -> None:
        self.read_bytes += size


def test_a_range_is_read_whole() -> None:
    world = World(FlakySource())
    assert world.ranges.read(10, 100) == DATA[10:110]
    assert world.ranges.read(0, 0) == b""
    assert (world.read_bytes, world.slept, world.said) == (100, [], [])
    assert world.ranges.size == len(DATA)


def test_the_identity_tells_revisions_and_files_apart() -> None:
    def identity(uri: str, fingerprint: str, path: str) -> str:
        file = SourceFile(path, 1)
        resolved = ResolvedRevision("v1", uri, (file,), fingerprint)
        around = Surroundings(
            lambda size: None, lambda s: None, lambda t: None, lambda: BadInput("")
        )
        return ranges_of(FlakySource(), resolved, file, around).identity

    names = {identity(*each) for each in (("a", "b", "c"), ("a", "b", "d"), ("a", "x", "c"))}
    assert len(names | {identity("x", "b", "c")}) == 4
    assert identity("a", "b", "c") in names


@pytest.mark.parametrize(
    "failure", [Transient("busy"), ConnectionResetError("cut"), TimeoutError()]
)
def test_it_goes_on_where_it_was_cut(failure: Exception) -> None:
    source = FlakySource(failure, failure)
    world = World(source)
    assert world.ranges.read(0, 2500) == DATA
    assert source.asked == [(0, 2500), (1000, 1500), (2000, 500)]
    assert world.read_bytes == 2500
    assert len(world.said) == 2
    assert all(wait <= limit for wait, limit in zip(world.slept, PAUSES_S, strict=False))


def test_a_source_that_keeps_failing_is_given_up() -> None:
    failures = [Transient("busy")] * (len(PAUSES_S) + 1)
    source = FlakySource(*failures, step=0)
    world = World(source)
    with pytest.raises(Transient, match="busy"):
        world.ranges.read(0, 10)
    assert len(world.slept) == len(PAUSES_S)
    assert not source.failures


def test_errors_of_the_system_are_given_words() -> None:
    world = World(FlakySource(*[OSError("gone")] * (len(PAUSES_S) + 1), step=0))
    with pytest.raises(Transient, match=r"Cannot read model\.safetensors from the source: gone"):
        world.ranges.read(0, 10)


@pytest.mark.parametrize("failure", [NotFound("gone"), BadInput("token")])
def test_errors_for_good_are_not_tried_again(failure: Exception) -> None:
    world = World(FlakySource(failure))
    with pytest.raises(type(failure)):
        world.ranges.read(0, 2500)
    assert world.slept == []


def test_a_file_that_became_shorter_is_told() -> None:
    world = World(FlakySource())
    with pytest.raises(BadInput, match="changed"):
        world.ranges.read(len(DATA) - 10, 20)


def test_whoever_stops_it_stops_it_between_two_readings_and_while_it_waits() -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    file = SourceFile("a", len(DATA))
    resolved = ResolvedRevision("v1", "file:models", (file,), "print")

    def read(on_read: Callable[[int], None], sleep: Callable[[float], None]) -> None:
        around = Surroundings(on_read, sleep, lambda text: None, lambda: BadInput(""))
        ranges_of(FlakySource(Transient("busy"), step=0), resolved, file, around).read(0, 10)

    with pytest.raises(Stop):
        read(lambda size: None, stop)
    with pytest.raises(Stop):
        read(stop, lambda seconds: None)
