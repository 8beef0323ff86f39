"""Reads a file of a source in ranges, to the last byte or to an error that says why not.

Sources behind a network try their own requests again and go on where they were cut; an error that
comes out of them was tried often enough. The few more rounds, with longer pauses, are for sources
that try nothing again (a folder on a file system that stumbles) and outages that are about to end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from typing import cast

from trainyard.errors import TrainyardError, Transient
from trainyard.sources.protocol import ResolvedRevision, Source, SourceFile
from trainyard.store.parts import Ranges

READ_BYTES = 1 << 20
"""Bytes read between two looks at whether the step goes on."""

PAUSES_S = (1.0, 8.0)
"""Seconds before each new try of one part; the source counts as failed after the last."""


@dataclass(frozen=True)
class Surroundings:
    """What a fetch does beside reading."""

    on_read: Callable[[int], None]
    """Told the bytes of each reading; may raise to end the fetch."""
    sleep: Callable[[float], object]
    """Waits that many seconds; may raise to end the fetch."""
    say: Callable[[str], None]
    """Takes a line for people."""
    too_short: Callable[[], TrainyardError]
    """Makes the error of a file that ends before its size."""


def ranges_of(
    source: Source, resolved: ResolvedRevision, file: SourceFile, around: Surroundings
) -> Ranges:
    """Return one file of a source as the store wants to read it."""
    return Ranges(
        size=file.size,
        identity=f"{resolved.uri}\0{resolved.fingerprint}\0{file.path}",
        read=partial(_read, source, resolved, file, around),
    )


def _read(
    source: Source,
    resolved: ResolvedRevision,
    file: SourceFile,
    around: Surroundings,
    start: int,
    size: int,
) -> bytearray:
    """Read a range whole; what arrived before a failure is kept.

    Raises:
        Transient: the source kept failing.
        TrainyardError: what the source raises for good, or `too_short`.
    """
    content = bytearray(size)
    room = memoryview(content)
    have = 0
    for pause_s in (*PAUSES_S, None):
        try:
            while have < size:
                with source.open_range(resolved, file.path, start + have, size - have) as opened:
                    # Every stream of a source can fill memory; `BinaryIO` does not say so.
                    stream = cast(BufferedIOBase, opened)
                    before = have
                    while count := stream.readinto(room[have : have + READ_BYTES]):
                        have += count
                        around.on_read(count)
                if have == before:
                    raise around.too_short()
            return content
        except (Transient, OSError) as error:
            if pause_s is None:
                raise _failed(file, error) from error
            around.say(f"{file.path}: {error}; trying again.")
            around.sleep(random.uniform(0.5, 1.0) * pause_s)
    raise AssertionError("the last try returns or raises")


def _failed(file: SourceFile, error: Exception) -> Transient:
    if isinstance(error, Transient):
        return error
    return Transient(
        f"Cannot read {file.path} from the source: {error}.",
        hint="Look at the source and the network, then try again; what arrived is kept.",
    )
