"""Content is what its source announced, or it is refused by name."""

from __future__ import annotations

import hashlib
import io

import pytest
from tests.hub_server import blob_id

from trainyard.errors import CorruptFile
from trainyard.sources.content_check import ContentCheck, check_content
from trainyard.sources.protocol import SourceFile

CONTENT = b"these are the bytes"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
LARGE = SourceFile("w.safetensors", len(CONTENT), sha256=SHA256)
SMALL = SourceFile("config.json", len(CONTENT), git_blob_id=blob_id(CONTENT))
PLAIN = SourceFile("vocab.txt", len(CONTENT))


def test_git_calls_an_empty_file_by_its_known_name() -> None:
    check_content(SourceFile("x", 0, git_blob_id="e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"), b"")


@pytest.mark.parametrize("file", [LARGE, SMALL, PLAIN])
def test_the_right_content_passes(file: SourceFile) -> None:
    check_content(file, CONTENT)
    stream = ContentCheck(file).watch(io.BytesIO(CONTENT))
    assert stream.read(5) + stream.read(0) + stream.read() == CONTENT
    assert stream.read() == b""


@pytest.mark.parametrize("file", [LARGE, SMALL])
def test_one_flipped_bit_is_found(file: SourceFile) -> None:
    with pytest.raises(CorruptFile, match=file.path):
        check_content(file, bytes([CONTENT[0] ^ 1]) + CONTENT[1:])


@pytest.mark.parametrize("file", [LARGE, SMALL, PLAIN])
@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"!", b""])
def test_another_size_is_found_at_the_end_of_the_stream(file: SourceFile, content: bytes) -> None:
    stream = ContentCheck(file).watch(io.BytesIO(content))
    with pytest.raises(CorruptFile, match="bytes instead of"):
        list(iter(lambda: stream.read(4), b""))


def test_a_stream_is_checked_against_its_blob_before_its_end_is_told() -> None:
    stream = ContentCheck(SMALL).watch(io.BytesIO(CONTENT[::-1]))
    assert stream.read(len(CONTENT))
    with pytest.raises(CorruptFile, match=r"config\.json has the git object id"):
        stream.read(1)
