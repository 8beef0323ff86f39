"""Writes the golden files anew: python -m tests.unit.presets.golden_files."""

from __future__ import annotations

from pathlib import Path

from trainyard.presets.commands import scripts
from trainyard.presets.known import presets

FOLDER = Path(__file__).with_name("golden")


def expected() -> dict[str, str]:
    """Return the scripts of all presets by file name."""
    return {
        f"{preset.name}.{name}.sh": text
        for preset in presets()
        for name, text in scripts(preset).items()
    }


if __name__ == "__main__":
    for old in FOLDER.glob("*.sh"):
        old.unlink()
    for file_name, content in expected().items():
        (FOLDER / file_name).write_text(content, encoding="utf-8")
