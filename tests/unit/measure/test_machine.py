from __future__ import annotations

import os
from pathlib import Path

from trainyard.canonical import canonical_json
from trainyard.measure.machine import _neuron_driver, _processor_name, describe_machine


def test_the_machine_is_described_in_json() -> None:
    found = describe_machine()
    assert canonical_json(found)
    assert found["threads"] == os.cpu_count()
    assert 1 <= found["usable_threads"] <= found["threads"]
    assert found["memory_gib"] > 0
    assert found["processor"]


def test_the_driver_of_neuron_devices_is_read_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("2.30.2.0\n")
    assert _neuron_driver(tmp_path / "version") == "2.30.2.0"
    assert _neuron_driver(tmp_path / "nowhere") == ""


def test_the_processors_name_is_read_from_the_kernel(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Example 9000: fast\nflags\t: fpu\n")
    assert _processor_name(cpuinfo) == "Example 9000: fast"
