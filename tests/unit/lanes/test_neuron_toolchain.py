"""The toolchain is read from metadata, and placeholders are no toolchain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.lanes.neuron_targets import TOOLCHAINS, native, nxdi

from trainyard.errors import BadInput
from trainyard.lanes.neuron_toolchain import read_neuron_toolchain
from trainyard.lanes.registry import get_lane
from trainyard.neuron_packages import MODULES, SMALLEST_REAL_PACKAGE_BYTES

NATIVE = TOOLCHAINS["neuron-native"]


def interpreter(folder: Path, packages: dict[str, str], *, path: Path | None = None) -> Path:
    """Return a serving interpreter that says that it has `packages`."""
    answer = {
        "path": [str(path or folder / "site")],
        "machine": "x86_64",
        "python": "3.13",
        "packages": packages,
    }
    python = folder / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    python.chmod(0o755)
    return python


def packages_of(toolchain: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in toolchain.items() if k not in ("machine", "python")}


def install(site: Path, name: str, version: str, *, size: int) -> None:
    """Write a distribution as pip leaves it, with a module of `size` bytes."""
    module = MODULES[name]
    (site / module).mkdir(parents=True)
    (site / module / "__init__.py").write_text("#" * size)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{module}/__init__.py,,{size}\n{info.name}/METADATA,,\n")


def test_all_versions_that_take_part_are_read(tmp_path: Path) -> None:
    python = interpreter(tmp_path, packages_of(NATIVE))
    assert read_neuron_toolchain(python, "neuron-native") == NATIVE


@pytest.mark.parametrize("missing", ["neuronx-cc", "vllm", "vllm-neuron", "torch"])
def test_a_missing_package_is_named(tmp_path: Path, missing: str) -> None:
    found = {k: v for k, v in packages_of(NATIVE).items() if k != missing}
    with pytest.raises(BadInput, match=f"lacks {missing}") as caught:
        read_neuron_toolchain(interpreter(tmp_path, found), "neuron-native")
    assert "TRAINYARD_SERVE_PYTHON" in caught.value.hint


def test_one_lowering_is_enough(tmp_path: Path) -> None:
    found = packages_of(NATIVE)
    del found["torch-neuronx"]
    assert "torch-neuronx" not in read_neuron_toolchain(
        interpreter(tmp_path, found), "neuron-native"
    )
    del found["libtorch-neuronx-lite"]
    with pytest.raises(BadInput, match="libtorch-neuronx-lite or torch-neuronx"):
        read_neuron_toolchain(interpreter(tmp_path, found), "neuron-native")


def test_lane_nxdi_needs_its_own_packages(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="neuronx-distributed-inference"):
        read_neuron_toolchain(interpreter(tmp_path, packages_of(NATIVE)), "neuron-nxdi")


def test_placeholders_are_refused(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, "neuronx-cc", "1.0.post1", size=120)
    install(site, "torch-neuronx", "2.9.0", size=SMALLEST_REAL_PACKAGE_BYTES)
    python = interpreter(tmp_path, packages_of(NATIVE), path=site)
    with pytest.raises(BadInput, match=r"neuronx-cc 1.0.post1 is an empty placeholder"):
        read_neuron_toolchain(python, "neuron-native")


def test_this_environment_is_no_neuron_environment() -> None:
    import sys

    with pytest.raises(BadInput, match="Lane neuron-nxdi cannot run here"):
        read_neuron_toolchain(Path(sys.executable), "neuron-nxdi")


def test_a_missing_or_broken_interpreter_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        read_neuron_toolchain(tmp_path / "nowhere", "neuron-native")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no encodings' >&2; exit 1\n")
    broken.chmod(0o755)
    with pytest.raises(BadInput, match="no encodings"):
        read_neuron_toolchain(broken, "neuron-native")


def test_a_toolchain_of_another_sdk_is_refused() -> None:
    lane = get_lane("neuron-native")
    assert lane.toolchain_problems(native(), NATIVE) == ()
    older = {**NATIVE, "neuronx-cc": "2.26.6360.0+ff"}
    (problem,) = lane.toolchain_problems(native(), older)
    assert "SDK 2.32.0 has neuronx-cc 2.27.5334" in problem
    assert lane.toolchain_problems(native(neuron__sdk="2.99.0"), older) == ()

    nxdi_lane, toolchain = get_lane("neuron-nxdi"), TOOLCHAINS["neuron-nxdi"]
    assert nxdi_lane.toolchain_problems(nxdi(), toolchain) == ()
    assert len(nxdi_lane.toolchain_problems(nxdi(neuron__sdk="2.30.0"), toolchain)) == 4
