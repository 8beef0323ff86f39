"""What commands print, where it cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="a device of Linux")


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("say('one'); say('two'); err.print('done')", 0),
        ("show('table')", 30),
        ("show_json({'a': 1})", 30),
    ],
)
def test_a_full_disk_is_no_traceback_and_ends_no_work(program: str, code: int) -> None:
    lines = (
        "from trainyard.console import err, say, show, show_json",
        "import typer",
        "def main() -> None:",
        f"    {program}",
        "typer.run(main)",
    )
    with FULL.open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
            check=False,
        )
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("Standard output cannot be written: No space left") == 1
    assert ("done" in ended.stderr) == (code == 0)
