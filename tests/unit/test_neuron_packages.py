"""Placeholders are told from real Neuron packages by what lies in the environment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from trainyard.errors import Refused
from trainyard.neuron_packages import MODULES, check_installed, require_real

STUB = 'raise ImportError("WRONG PACKAGE. Please install the package from Neuron Repository")\n'
CODE = "VALUE = 1\n" * 1000


def install(
    site: Path,
    name: str,
    version: str,
    files: Mapping[str, str],
    *,
    description: str = "",
    editable: bool = False,
) -> None:
    """Write an installed distribution: its files, its metadata and the record of both."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n{description}\n"
    contents = {**files, f"{info.name}/METADATA": metadata}
    if editable:
        origin = {"url": "file:///checkout", "dir_info": {"editable": True}}
        contents[f"{info.name}/direct_url.json"] = json.dumps(origin)
    for path, text in contents.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    record = "".join(f"{path},,{len(text)}\n" for path, text in contents.items())
    (info / "RECORD").write_text(record + f"{info.name}/RECORD,,\n")


def reasons(site: Path) -> dict[str, str]:
    return {problem.distribution: problem.reason for problem in check_installed([str(site)])}


def test_real_packages_pass(tmp_path: Path) -> None:
    for name, module in MODULES.items():
        install(tmp_path, name, "2.28.7631.0", {f"{module}/__init__.py": CODE})

    assert check_installed([str(tmp_path)]) == []
    assert require_real([str(tmp_path)]) == [f"{name} 2.28.7631.0" for name in sorted(MODULES)]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_placeholder_of_the_public_registry_is_named(tmp_path: Path, name: str) -> None:
    # These packages put their code below the distribution's own name, importable or not.
    install(tmp_path, name, "1.0", {f"{name}/__init__.py": STUB}, description="WRONG PACKAGE.")

    (problem,) = check_installed([str(tmp_path)])

    assert (problem.distribution, problem.version) == (name, "1.0")
    assert "its description says 'WRONG PACKAGE'" in str(problem)


def test_placeholder_without_the_real_module(tmp_path: Path) -> None:
    install(tmp_path, "neuronx-cc", "1.0.post1", {"neuronx-cc/__init__.py": CODE})

    assert reasons(tmp_path) == {"neuronx-cc": "it has no module 'neuronxcc'"}


def test_placeholder_that_only_raises(tmp_path: Path) -> None:
    files = {"torch_neuronx/__init__.py": STUB, "torch_neuronx/padding.py": CODE}
    install(tmp_path, "torch-neuronx", "1.0", files)

    assert "importing 'torch_neuronx' only raises" in reasons(tmp_path)["torch-neuronx"]


def test_placeholder_that_is_merely_empty(tmp_path: Path) -> None:
    install(tmp_path, "libneuronxla", "1.0", {"libneuronxla/__init__.py": "VALUE = 1\n"})

    assert reasons(tmp_path) == {"libneuronxla": "all its files together have 10 bytes"}


def test_checkout_installed_editable_is_real(tmp_path: Path) -> None:
    files = {"__editable__.vllm_neuron.pth": "/checkout\n"}
    install(tmp_path, "vllm-neuron", "0.7.0", files, editable=True)

    assert check_installed([str(tmp_path)]) == []


def test_names_are_compared_in_their_normal_form(tmp_path: Path) -> None:
    install(tmp_path, "Torch_NeuronX", "1.0", {"torch_neuronx/__init__.py": STUB})

    assert list(reasons(tmp_path)) == ["torch-neuronx"]


def test_refusal_says_what_to_do(tmp_path: Path) -> None:
    install(tmp_path, "neuronx-cc", "1.0", {"neuronx-cc/__init__.py": STUB})

    with pytest.raises(Refused, match=r"neuronx-cc 1\.0 is an empty placeholder") as caught:
        require_real([str(tmp_path)])

    assert "Neuron Deep Learning Containers" in caught.value.hint
    assert "AWS Neuron pip repository" in caught.value.hint


def test_no_neuron_package_at_all_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "numpy", "2.4.6", {"numpy/__init__.py": CODE})

    assert check_installed([str(tmp_path)]) == []
    with pytest.raises(Refused, match="No AWS Neuron package is installed"):
        require_real([str(tmp_path)])


@pytest.mark.parametrize(
    ("code", "exit_code", "stream"), [(CODE, 0, "stdout"), (STUB, Refused.exit_code, "stderr")]
)
def test_command_exits_as_an_image_build_needs(
    tmp_path: Path, code: str, exit_code: int, stream: str
) -> None:
    install(tmp_path, "torch-neuronx", "2.9.0", {"torch_neuronx/__init__.py": code})

    done = subprocess.run(
        [sys.executable, "-m", "trainyard.neuron_packages"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == exit_code
    assert "torch-neuronx 2.9.0" in getattr(done, stream)
