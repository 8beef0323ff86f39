"""What the files of a bundle say about themselves, and whether a toolchain agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.fake_neuron import NativeCache, Neff, put, write_module

from trainyard.errors import CorruptFile
from trainyard.lanes.bundle_facts import contradictions, neff_records, recorded_versions
from trainyard.lanes.cache_files import files_below


def below(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in files_below(folder)]


def test_each_neff_is_recorded_with_what_its_header_says(tmp_path: Path) -> None:
    cache = NativeCache(tmp_path, neff=Neff(feature_bits=0x100, lnc_size=2))
    keys = sorted(cache.compile(number) for number in range(3))
    records = neff_records(tmp_path, below(tmp_path))
    assert [record.path for record in records] == [
        f"neuron/compile_cache/{key}/graph_{key}.neff" for key in keys
    ]
    assert records[0].name == f"graph_{keys[0]}"
    assert records[0].version == "2.0"
    assert records[0].feature_bits == "0x100"
    assert records[0].lnc_size == 2
    assert records[0].uuid == bytes(range(16)).hex()
    assert records[0].build_version.startswith("2.0.21884")


def test_a_file_that_is_no_neff_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a" / "graph.neff", b"PK")
    with pytest.raises(CorruptFile, match=r"^a/graph\.neff"):
        neff_records(tmp_path, below(tmp_path))


def test_versions_are_found_in_logs_folders_and_configurations(tmp_path: Path) -> None:
    assert recorded_versions(tmp_path, []) == {}
    NativeCache(tmp_path, compiler="2.27.5334.0+abc").compile()
    write_module(tmp_path / "xla")
    config = {"neuron_config": {"neuronxcc_version": "2.26.6360.0"}}
    put(tmp_path / "neuron_config.json", json.dumps(config).encode())
    assert recorded_versions(tmp_path, below(tmp_path)) == {
        "neuronx-cc": ("2.26.6360.0", "2.27.5334.0+abc", "2.27.5334.0+b7b01d0a")
    }


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"neuron_config": {"compiler_version": 2}}'])
def test_a_configuration_that_names_no_version(tmp_path: Path, text: bytes) -> None:
    put(tmp_path / "neuron_config.json", text)
    assert recorded_versions(tmp_path, below(tmp_path)) == {}


@pytest.mark.parametrize(
    ("recorded", "planned", "same"),
    [
        ("2.27.5334.0+abc", "2.27.5334.0+abc", True),
        ("2.27.5334.0+abc", "2.27.5334", True),
        ("2.27.5334", "2.27.5334.0+abc", True),
        ("2.27.5334.0+abc", "2.27.5335", False),
        ("2.2", "2.27", False),
        ("2.26.6360.0", "2.27.5334.0", False),
    ],
)
def test_versions_are_compared_as_far_as_both_are_given(
    recorded: str, planned: str, same: bool
) -> None:
    for name in ("neuronx-cc", "neuronx_cc"):
        problems = contradictions({"neuronx-cc": [recorded]}, {name: planned})
        assert problems == () if same else [recorded in line for line in problems] == [True]


def test_what_a_toolchain_does_not_name_cannot_contradict_it() -> None:
    assert contradictions({"neuronx-cc": ["2.27"]}, {"vllm": "0.32.0"}) == ()
