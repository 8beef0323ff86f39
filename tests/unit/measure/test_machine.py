from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainyard.canonical import canonical_json
from trainyard.lanes import neuron_device
from trainyard.measure.machine import _processor_name, describe_machine


def test_the_machine_is_described_in_json() -> None:
    found = describe_machine()
    assert canonical_json(found)
    assert found["threads"] == os.cpu_count()
    assert 1 <= found["usable_threads"] <= found["threads"]
    assert found["memory_gib"] > 0
    assert found["processor"]


def test_the_driver_of_neuron_devices_is_read_from_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuron_device, "VERSION_FILE", tmp_path / "version")
    assert neuron_device.driver_version() == ""
    assert describe_machine()["neuron_driver"] == ""
    (tmp_path / "version").write_text("2.30.2.0\n")
    assert neuron_device.driver_version() == "2.30.2.0"
    assert describe_machine()["neuron_driver"] == "2.30.2.0"


def test_the_processors_name_is_read_from_the_kernel(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Example 9000: fast\nflags\t: fpu\n")
    assert _processor_name(cpuinfo) == "Example 9000: fast"
