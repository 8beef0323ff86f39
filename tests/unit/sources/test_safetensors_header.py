"""The header parser against the real writer, and against files that were tampered with."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from tests.unit.sources.model_files import safetensors

from trainyard.errors import CorruptFile
from trainyard.sources.architecture import Tensor
from trainyard.sources.safetensors_header import read_header

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}


def parse(data: bytes, size: int | None = None) -> tuple[Tensor, ...]:
    stream = io.BytesIO(data)
    return read_header(stream, size=len(data) if size is None else size, name="x").tensors


def encode(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
def test_reads_what_the_library_writes(tensors: dict[str, tuple[str, list[int]]]) -> None:
    arrays = {name: np.zeros(shape, DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    data = save(arrays)
    expected = {Tensor(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
    assert set(parse(data)) == expected
    with pytest.raises(CorruptFile):
        parse(data + b"\0")


@given(st.data())
def test_every_truncation_is_noticed(draw: st.DataObject) -> None:
    data = safetensors({"a": [2, 3], "b": [5]})
    cut = draw.draw(st.integers(0, len(data) - 1))
    with pytest.raises(CorruptFile):
        parse(data[:cut])


@given(st.binary(max_size=200))
def test_rubbish_is_refused_and_never_crashes(data: bytes) -> None:
    with pytest.raises(CorruptFile):
        parse(b"\xff" + data)


def test_truncated_data_says_how_many_bytes_are_missing() -> None:
    data = safetensors({"a": [4]})
    with pytest.raises(
        CorruptFile, match=r"x is truncated: its tensors take 16 bytes, 9 are there"
    ):
        parse(data[:-7])


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ([], "no object"),
        (b'{"a": ', "broken header"),
        (b'{"a":{"dtype":"U8","shape":[1,1]},"b":1,"a":2}', "occurs twice"),
        (b"[" * 100_000, "broken header"),
        ({"a": {"dtype": "U8", "shape": [1]}}, "'a' is broken"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, "'a' is broken"),
        ({"\udcff": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, "no valid text"),
        ({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 1]}}, "unknown type 'X9'"),
        ({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, r"shape \[-1\]"),
        ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, r"shape \[True\]"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1]}}, "cannot fill"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]}}, "cannot fill"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, "begins at byte 1"),
        (
            {
                "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            },
            "'b' begins at byte 1 of the data, not at 2",
        ),
    ],
)
def test_contradictions_are_named(header: Any, complaint: str) -> None:
    with pytest.raises(CorruptFile, match=complaint):
        parse(encode(header, b"\0" * 4))


def test_a_huge_header_length_is_refused_without_reading_it() -> None:
    with pytest.raises(CorruptFile, match="not a safetensors file"):
        parse((1 << 60).to_bytes(8, "little"), size=1 << 61)
