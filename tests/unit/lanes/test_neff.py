"""Any header that is written field by field is read back; whatever does not fit is refused."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.fake_neuron import Neff, archive

from trainyard.errors import CorruptFile
from trainyard.lanes.neff import (
    HEADER_BYTES,
    check_against,
    offset_of,
    parse_header,
    read_header,
    read_neff,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def text(limit: int) -> st.SearchStrategy[bytes]:
    """Text of at most `limit` bytes, as it can be in a field that ends with NUL."""
    printable = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=limit)
    return printable.map(str.encode).filter(lambda raw: len(raw) <= limit)


HEADERS = st.builds(
    Neff,
    pkg_version=st.sampled_from([1, 2]),
    neff_version_major=st.sampled_from([0, 1, 2]),
    neff_version_minor=U64,
    neff_build_version=text(128),
    num_tpb=U32,
    hash=st.binary(min_size=32, max_size=32),
    uuid=st.binary(min_size=16, max_size=16),
    name=text(256),
    requested_tpb_count=U32,
    tpb_per_node=st.binary(min_size=64, max_size=64),
    feature_bits=U64,
    lnc_size=U32,
    pad=st.binary(max_size=468),
    data=st.binary(min_size=1, max_size=64),
)


def parse(raw: bytes, size: int | None = None) -> Any:
    return parse_header(
        raw[:HEADER_BYTES], size=len(raw) if size is None else size, name="a/graph.neff"
    )


@given(HEADERS)
def test_every_field_is_read_back(written: Neff) -> None:
    assert written.data is not None
    assert written.hash is not None
    header = parse(written.to_bytes())
    assert header.pkg_version == written.pkg_version
    assert header.header_size == HEADER_BYTES
    assert header.data_size == len(written.data)
    assert header.version == f"{written.neff_version_major}.{written.neff_version_minor}"
    assert header.build_version == written.neff_build_version.decode()
    assert header.num_tpb == written.num_tpb
    assert header.hash == written.hash.hex()
    assert header.uuid == written.uuid.hex()
    assert header.name == written.name.decode()
    assert header.requested_tpb_count == written.requested_tpb_count
    assert header.tpb_per_node == tuple(written.tpb_per_node)
    assert header.feature_bits == written.feature_bits
    assert header.lnc_size == written.lnc_size


@given(HEADERS, st.data())
def test_a_truncated_file_is_refused_wherever_it_ends(written: Neff, data: st.DataObject) -> None:
    raw = written.to_bytes()
    end = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(CorruptFile, match=r"^a/graph\.neff is"):
        parse(raw[:end])


KNOWN = {"pkg_version": (1, 2), "neff_version_major": (0, 1, 2)}
STRUCTURE = ("pkg_version", "header_size", "data_size", "neff_version_major")


@given(HEADERS, st.integers(1, 255), st.sampled_from(STRUCTURE), st.integers(0, 7))
def test_a_flipped_structural_byte_is_refused(
    written: Neff, mask: int, field: str, byte: int
) -> None:
    raw = bytearray(written.to_bytes())
    place = STRUCTURE.index(field) * 8
    raw[place + byte] ^= mask
    value = int.from_bytes(raw[place : place + 8], "little")
    # Another version that exists is another valid header.
    assume(value not in KNOWN.get(field, ()))
    with pytest.raises(CorruptFile, match=rf"{field} at byte {place} is {value}, not "):
        parse(bytes(raw))


def test_a_file_of_another_kind_is_refused() -> None:
    for raw in (b"", b"PK\x03\x04", b"\x7fELF" * 1000, b"\0" * 5000):
        with pytest.raises(CorruptFile, match=r"a/graph\.neff"):
            parse(raw)


def test_bytes_that_are_left_over_are_named() -> None:
    raw = Neff().to_bytes()
    with pytest.raises(CorruptFile, match=rf"data_size at byte 16 is {len(raw) - 1024}, not the"):
        parse(raw + b"\0")


def test_the_fields_lie_where_the_documentation_says() -> None:
    places = {"pkg_version": 0, "num_tpb": 168, "hash": 172, "uuid": 204, "name": 220}
    places |= {"requested_tpb_count": 476, "feature_bits": 544, "lnc_size": 552, "pad": 556}
    assert {field: offset_of(field) for field in places} == places


def test_a_name_that_is_no_text_is_shown_in_escapes() -> None:
    assert parse(Neff(name=b"a\xff").to_bytes()).name == r"a\xff"


def inflated(data: bytes) -> bytes | None:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return None


class TestArchive:
    @pytest.mark.parametrize("packaging", [1, 2])
    def test_a_whole_file_is_read_to_its_end(self, tmp_path: Path, packaging: int) -> None:
        data = archive(b"x" * 3_000_000, packaging=packaging)
        path = tmp_path / "graph.neff"
        path.write_bytes(Neff(pkg_version=packaging, data=data).to_bytes())
        assert read_neff(path) == read_header(path)

    def test_one_flipped_byte_that_changes_the_archive_is_found(self, tmp_path: Path) -> None:
        whole = archive()
        path = tmp_path / "graph.neff"
        found = 0
        for place in range(len(whole)):
            data = bytearray(whole)
            data[place] ^= 0x40
            if inflated(bytes(data)) == inflated(whole):
                continue  # the time in gzip's header, and bits that fill up the last byte
            path.write_bytes(Neff(data=bytes(data)).to_bytes())
            with pytest.raises(CorruptFile, match=r"graph\.neff"):
                read_neff(path)
            found += 1
        assert found > 0.9 * len(whole)

    @pytest.mark.parametrize(
        ("packaging", "data", "word"),
        [
            (2, archive()[:-1], "cut short"),
            (2, archive() + b"\0", "bytes after the end"),
            (2, archive(packaging=1), "damaged archive"),
            (1, archive(), "no tar archive"),
            (1, b"\0" * 10240, "no tar archive"),
            (1, b"x", "no tar archive"),
        ],
    )
    def test_an_archive_of_another_kind_is_refused(
        self, tmp_path: Path, packaging: int, data: bytes, word: str
    ) -> None:
        path = tmp_path / "graph.neff"
        path.write_bytes(Neff(pkg_version=packaging, data=data).to_bytes())
        with pytest.raises(CorruptFile, match=rf"^entry/graph\.neff .*{word}.*byte 1024"):
            read_neff(path, name="entry/graph.neff")
        assert read_header(path).data_size == len(data)


class TestTarget:
    def problems(self, written: Neff, **target: Any) -> tuple[str, ...]:
        return check_against(parse(written.to_bytes()), **{"lnc": 2, "cores": 8, **target})

    def test_what_fits_has_no_problems(self) -> None:
        assert self.problems(Neff()) == ()
        assert self.problems(Neff(num_tpb=16, requested_tpb_count=16)) == ()
        assert self.problems(Neff(lnc_size=1), lnc=None, cores=None) == ()

    def test_a_file_that_records_no_lnc_was_made_for_one(self) -> None:
        assert self.problems(Neff(lnc_size=0), lnc=1) == ()
        assert "for 1 physical cores" in self.problems(Neff(lnc_size=0))[0]

    def test_another_lnc_is_named(self) -> None:
        (problem,) = self.problems(Neff(lnc_size=1))
        assert "lnc_size" in problem
        assert problem.endswith("the target has 2.")

    @pytest.mark.parametrize("field", ["num_tpb", "requested_tpb_count"])
    def test_more_cores_than_the_target_has_are_named(self, field: str) -> None:
        (problem,) = self.problems(Neff(**{field: 17}))  # type: ignore[arg-type]
        assert "needs 17 cores" in problem
        assert f"{field} 17" in problem

    def test_features_that_the_runtime_lacks_are_named(self) -> None:
        assert self.problems(Neff(feature_bits=0x1), features=0xFF) == ()
        (problem,) = self.problems(Neff(feature_bits=0x101), features=0xFF)
        assert "0x100" in problem

    def test_all_problems_are_told(self) -> None:
        written = Neff(lnc_size=1, num_tpb=99, feature_bits=1)
        assert len(self.problems(written, features=0)) == 3
