"""Reads the header of a safetensors file: names, types and shapes, without the numbers.

A safetensors file is 8 bytes (length of the header, little endian), the header (JSON), and the
tensors' bytes, one after the other without gaps. A file that is cut short therefore shows in its
size alone. This parser works on any stream, so that a file need not be fetched to be judged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from trainyard.errors import CorruptFile
from trainyard.sources.architecture import Tensor

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element."""

_REMEDY = "Copy or export the file again."


@dataclass(frozen=True)
class Header:
    """What the header of one file says."""

    tensors: tuple[Tensor, ...]
    """In the order of their bytes."""
    raw: bytes
    """The JSON as it is in the file."""


@dataclass(frozen=True)
class _Placed:
    """A tensor and its place in the data, in bytes."""

    begin: int
    end: int
    tensor: Tensor


def read_header(stream: BinaryIO, *, size: int, name: str) -> Header:
    """Read and check the header at the start of `stream`.

    Args:
        stream: the file from its first byte.
        size: bytes of the whole file.
        name: what messages call the file.

    Raises:
        CorruptFile: it is no safetensors file, its header contradicts itself, or bytes are missing
            or left over.
    """
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise CorruptFile(f"{name} is too short for a safetensors file.", hint=_REMEDY)
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CorruptFile(f"{name} is not a safetensors file.", hint=_REMEDY)
    if 8 + length > size:
        raise CorruptFile(
            f"{name} is truncated: its header alone takes {8 + length} bytes, {size} are there.",
            hint=_REMEDY,
        )
    raw = stream.read(length)
    if len(raw) < length:
        raise CorruptFile(f"{name} ends inside its header.", hint=_REMEDY)
    placed = sorted(_entries(raw, name), key=lambda entry: (entry.begin, entry.end))
    _check_places(placed, data_bytes=size - 8 - length, name=name)
    return Header(tensors=tuple(entry.tensor for entry in placed), raw=raw)


def _entries(raw: bytes, name: str) -> list[_Placed]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{name} has a broken header: {error}.", hint=_REMEDY) from error
    if not isinstance(header, dict):
        raise CorruptFile(f"{name} has a broken header: no object.", hint=_REMEDY)
    return [
        _entry(tensor, value, name) for tensor, value in header.items() if tensor != "__metadata__"
    ]


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice")
    return value


def _entry(tensor: str, value: Any, name: str) -> _Placed:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise CorruptFile(f"{name}: the header's entry {tensor!r} is broken.", hint=_REMEDY)
    if not _is_text(tensor):
        raise CorruptFile(f"{name}: the tensor name {tensor!r} is no valid text.", hint=_REMEDY)
    if dtype not in _BITS:
        raise CorruptFile(
            f"{name}: tensor {tensor!r} has the unknown type {dtype!r}.",
            hint=f"Known types: {', '.join(_BITS)}.",
        )
    if not all(type(length) is int and length >= 0 for length in shape):
        raise CorruptFile(f"{name}: tensor {tensor!r} has the shape {shape}.", hint=_REMEDY)
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin) or begin < 0:
        raise CorruptFile(
            f"{name}: tensor {tensor!r} ({dtype}, shape {shape}) cannot fill the bytes "
            f"{begin} to {end}.",
            hint=_REMEDY,
        )
    return _Placed(begin, end, Tensor(name=tensor, dtype=dtype, shape=tuple(shape)))


def _is_text(text: str) -> bool:
    """Tell whether it has no half characters (lone surrogates), which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_places(placed: Sequence[_Placed], *, data_bytes: int, name: str) -> None:
    position = 0
    for entry in placed:
        if entry.begin != position:
            raise CorruptFile(
                f"{name}: tensor {entry.tensor.name!r} begins at byte {entry.begin} of the data, "
                f"not at {position}.",
                hint=_REMEDY,
            )
        position = entry.end
    if position > data_bytes:
        raise CorruptFile(
            f"{name} is truncated: its tensors take {position} bytes, {data_bytes} are there.",
            hint=_REMEDY,
        )
    if position < data_bytes:
        raise CorruptFile(
            f"{name} has {data_bytes - position} bytes that belong to no tensor.", hint=_REMEDY
        )
