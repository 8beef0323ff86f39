"""A start that may not compile finds a compiler that fails and says why."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from trainyard.lanes.without_compiler import EXIT_CODE, MESSAGE, SHADOWED, shadow_compiler


@pytest.mark.parametrize("name", SHADOWED)
def test_the_compiler_is_out_of_reach(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "bin"
    real.mkdir()
    (real / name).write_text("#!/bin/sh\necho compiled\n")
    (real / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{real}{os.pathsep}{os.environ['PATH']}")
    assert subprocess.run([name], capture_output=True, text=True).stdout == "compiled\n"
    folder = tmp_path / "shadow"
    folder.mkdir()

    shadow_compiler(folder)

    done = subprocess.run([name, "compile", "graph.hlo"], capture_output=True, text=True)
    assert done.returncode == EXIT_CODE
    assert MESSAGE in done.stderr
    assert done.stdout == ""
