from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from trainyard.errors import BadInput
from trainyard.lanes.cpu_toolchain import read_toolchain


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Return a serving interpreter that says what it has."""
    answer = {
        "machine": "x86_64",
        "python": "3.11",
        "site-packages": "/opt/serve/lib",
        "torch": "2.13.0+cpu",
        "vllm": "0.32.0",
    }
    return script(tmp_path / "python", f"echo '{json.dumps(answer)}'")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a compiler into the path that knows a processor with two features."""
    script(
        tmp_path / "bin" / "g++",
        'case "$*" in\n'
        "  -dumpfullversion*) echo 12.2.0;;\n"
        '  -march=native*) for x in SSE AVX2 FMA; do echo "#define __${x}__ 1"; done;;\n'
        "  *) echo '#define __SSE__ 1';;\n"
        "esac",
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")


@pytest.mark.usefixtures("compiler")
def test_the_toolchain_names_versions_and_what_the_compiler_may_use(python: Path) -> None:
    assert read_toolchain(python) == {
        "machine": "x86_64",
        "python": "3.11",
        "site-packages": "/opt/serve/lib",
        "torch": "2.13.0+cpu",
        "vllm": "0.32.0",
        "c++": "12.2.0",
        "processor": "avx2 fma",
    }


@pytest.mark.usefixtures("compiler")
def test_missing_packages_are_named() -> None:
    # The interpreter of these tests has no vLLM.
    with pytest.raises(BadInput, match="vllm") as caught:
        read_toolchain(Path(sys.executable))
    assert "make setup" in caught.value.hint


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere") as caught:
        read_toolchain(tmp_path / "nowhere" / "python")
    assert "TRAINYARD_SERVE_PYTHON" in caught.value.hint


def test_a_broken_interpreter_says_what_it_said(tmp_path: Path) -> None:
    broken = script(tmp_path / "python", "echo 'no encodings' >&2; exit 1")
    with pytest.raises(BadInput, match="no encodings"):
        read_toolchain(broken)


def test_a_missing_compiler_is_named(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(BadInput, match=r"C\+\+ compiler"):
        read_toolchain(python)
