"""Reads NEFF files, the executables of the Neuron runtime, without AWS's tools.

A NEFF is a header of 1024 bytes, little endian and without gaps, and a tar archive, which is
compressed with gzip in the packaging of today (`pkg_version` 2) and plain in the older one (1).
AWS documents the header in the SDK's guide "Work with NEFF files"; there is no magic number, so a
file is known by what fits together. The header's own hash is not compared: AWS does not say which
bytes it covers. The checksum that gzip keeps of its content is, so that a damaged archive is found.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainyard.errors import CorruptFile

HEADER_BYTES = 1024
SUFFIX = ".neff"

PACKAGINGS = (1, 2)
"""`pkg_version`: 1 is a plain tar archive, 2 a compressed one."""

MAJOR_VERSIONS = (0, 1, 2)
"""`neff_version_major` that runtimes of today load."""

_FIELDS = (
    ("pkg_version", "Q"),
    ("header_size", "Q"),
    ("data_size", "Q"),
    ("neff_version_major", "Q"),
    ("neff_version_minor", "Q"),
    ("neff_build_version", "128s"),
    ("num_tpb", "I"),
    ("hash", "32s"),
    ("uuid", "16s"),
    ("name", "256s"),
    ("requested_tpb_count", "I"),
    ("tpb_per_node", "64s"),
    ("feature_bits", "Q"),
    ("lnc_size", "I"),
    ("pad", "468s"),
)
_LAYOUT = struct.Struct("<" + "".join(form for _, form in _FIELDS))

_GZIP = 31
"""`wbits` of zlib for a gzip stream."""
_CHUNK_BYTES = 1 << 20
_TAR_MAGIC_AT = 257
_TAR_MAGIC = b"ustar"
_TAR_BLOCK_BYTES = 512

_REMEDY = "Compile it again, or copy it again from where it was compiled."


@dataclass(frozen=True)
class NeffHeader:
    """The header of one NEFF."""

    pkg_version: int
    """How the data are packed: see `PACKAGINGS`."""
    header_size: int
    """Bytes; always 1024."""
    data_size: int
    """Bytes of the archive as it is stored."""
    version_major: int
    version_minor: int
    build_version: str
    """The compiler's own tag; nothing parses it."""
    num_tpb: int
    """Cores that the graph needs to run as it was made to."""
    hash: str
    """64 hex digits: SHA-256, or MD5 in the first half, as `pkg_version` says."""
    uuid: str
    """32 hex digits."""
    name: str
    requested_tpb_count: int
    """Cores that were asked for when it was compiled."""
    tpb_per_node: tuple[int, ...]
    """Cores of each of at most 64 nodes of the graph."""
    feature_bits: int
    """Features that a runtime must have to load it."""
    lnc_size: int
    """Physical cores in one logical core; 0 in files of compilers that did not record it."""

    @property
    def version(self) -> str:
        """The NEFF version as the runtime prints it, such as `2.0`."""
        return f"{self.version_major}.{self.version_minor}"


def offset_of(field: str) -> int:
    """Return the byte at which a field of the header begins, by its documented name."""
    names = [name for name, _ in _FIELDS]
    forms = "".join(form for _, form in _FIELDS[: names.index(field)])
    return struct.calcsize(f"<{forms}")


def parse_header(raw: bytes, *, size: int, name: str) -> NeffHeader:
    """Return what the header says.

    Args:
        raw: the first 1024 bytes of the file.
        size: bytes of the whole file.
        name: what messages call the file.

    Raises:
        CorruptFile: it is no NEFF, is cut short, or has bytes left over; the message names the
            file, the field and its place.
    """
    if len(raw) < HEADER_BYTES or size < HEADER_BYTES:
        raise CorruptFile(
            f"{name} is cut short: a NEFF's header takes {HEADER_BYTES} bytes, "
            f"{min(len(raw), size)} are there.",
            hint=_REMEDY,
        )
    values = dict(zip((field for field, _ in _FIELDS), _LAYOUT.unpack_from(raw), strict=True))

    def demand(field: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise CorruptFile(
                f"{name} is not a NEFF that can be used: {field} at byte {offset_of(field)} is "
                f"{values[field]}, not {wanted}.",
                hint=_REMEDY,
            )

    demand("pkg_version", values["pkg_version"] in PACKAGINGS, _either(PACKAGINGS))
    demand("header_size", values["header_size"] == HEADER_BYTES, str(HEADER_BYTES))
    demand(
        "neff_version_major",
        values["neff_version_major"] in MAJOR_VERSIONS,
        _either(MAJOR_VERSIONS),
    )
    data_bytes = size - HEADER_BYTES
    demand(
        "data_size",
        0 < values["data_size"] == data_bytes,
        f"the {data_bytes} bytes that follow the header",
    )
    return NeffHeader(
        pkg_version=values["pkg_version"],
        header_size=values["header_size"],
        data_size=values["data_size"],
        version_major=values["neff_version_major"],
        version_minor=values["neff_version_minor"],
        build_version=_text(values["neff_build_version"]),
        num_tpb=values["num_tpb"],
        hash=values["hash"].hex(),
        uuid=values["uuid"].hex(),
        name=_text(values["name"]),
        requested_tpb_count=values["requested_tpb_count"],
        tpb_per_node=tuple(values["tpb_per_node"]),
        feature_bits=values["feature_bits"],
        lnc_size=values["lnc_size"],
    )


def read_header(path: Path, *, name: str = "") -> NeffHeader:
    """Return the header of a file without reading its data. Raises as `parse_header`."""
    with path.open("rb") as stream:
        size = path.stat().st_size
        return parse_header(stream.read(HEADER_BYTES), size=size, name=name or str(path))


def read_neff(path: Path, *, name: str = "") -> NeffHeader:
    """Return the header of a file, and read its archive once to its end.

    Args:
        path: the file.
        name: what messages call it; empty: its path.

    Raises:
        CorruptFile: as `parse_header`, or the archive is damaged or packed in another way than the
            header says.
    """
    name = name or str(path)
    with path.open("rb") as stream:
        header = parse_header(stream.read(HEADER_BYTES), size=path.stat().st_size, name=name)
        chunks = _inflated(stream, name) if header.pkg_version == 2 else _read(stream)
        start = b""
        for chunk in chunks:
            if len(start) < _TAR_BLOCK_BYTES:
                start += chunk[:_TAR_BLOCK_BYTES]
    if start[_TAR_MAGIC_AT : _TAR_MAGIC_AT + len(_TAR_MAGIC)] != _TAR_MAGIC:
        raise _damaged(name, "holds no tar archive as its pkg_version says")
    return header


def check_against(
    header: NeffHeader, *, lnc: int | None, cores: int | None, features: int | None = None
) -> tuple[str, ...]:
    """Return why a NEFF does not fit where it is to run, each as a sentence.

    Args:
        header: of the NEFF.
        lnc: physical cores in one logical core there; None: not known.
        cores: logical cores that one replica spans; None: not known.
        features: the bits that the runtime there supports; None: not known.
    """
    problems = []
    recorded = header.lnc_size or 1
    if lnc is not None and recorded != lnc:
        problems.append(
            f"It was compiled for {recorded} physical cores in one logical core (lnc_size), the "
            f"target has {lnc}."
        )
    needed = max(header.num_tpb, header.requested_tpb_count)
    if cores is not None and needed > cores * (lnc or recorded):
        problems.append(
            f"It needs {needed} cores (num_tpb {header.num_tpb}, requested_tpb_count "
            f"{header.requested_tpb_count}), the target has {cores} logical cores of "
            f"{lnc or recorded}."
        )
    if features is not None and header.feature_bits & ~features:
        problems.append(
            f"It needs features {header.feature_bits & ~features:#x} that the runtime lacks."
        )
    return tuple(problems)


def _either(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"


def _text(raw: bytes) -> str:
    """Return the text up to the first NUL; bytes that are no UTF-8 are shown as escapes."""
    return raw.split(b"\0", 1)[0].decode(errors="backslashreplace")


def _damaged(name: str, what: str) -> CorruptFile:
    return CorruptFile(f"{name} {what} (data from byte {HEADER_BYTES}).", hint=_REMEDY)


def _read(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _inflated(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the content of a gzip stream, bounded in memory, and check that it is whole."""
    engine = zlib.decompressobj(_GZIP)
    try:
        for chunk in _read(stream):
            while chunk:
                if engine.eof:
                    raise _damaged(name, "has bytes after the end of its archive")
                yield engine.decompress(chunk, _CHUNK_BYTES)
                chunk = engine.unconsumed_tail or engine.unused_data
    except zlib.error as error:
        raise _damaged(name, f"has a damaged archive: {error}") from error
    if not engine.eof:
        raise _damaged(name, "has an archive that is cut short")
