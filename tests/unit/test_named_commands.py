"""Commands that messages and documents name exist."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from trainyard.cli import app

REPOSITORY = Path(__file__).parents[2]
NAMED = re.compile(r"`trainyard ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?")


def texts() -> list[Path]:
    places = ("tasks", "plugins", "dags", "docs")
    found = [path for place in places for path in (REPOSITORY / place).rglob("*")]
    kinds = {".py", ".md", ".yaml", ".j2"}
    return [REPOSITORY / "README.md", *(path for path in found if path.suffix in kinds)]


def named_commands() -> list[tuple[str, str, str]]:
    """Return command, the word after it, and the file, of every command that is named."""
    return sorted(
        {
            (command, word, str(path.relative_to(REPOSITORY)))
            for path in texts()
            for command, word in NAMED.findall(path.read_text())
        }
    )


@cache
def commands_there_are() -> Mapping[str, Any]:
    """Return the commands by name; to make them takes a while."""
    found: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(("command", "word", "place"), named_commands())
def test_a_named_command_exists(command: str, word: str, place: str) -> None:
    commands = commands_there_are()
    assert command in commands, f"{place} names `trainyard {command}`"
    below = getattr(commands[command], "commands", None)
    if below is not None and word:
        assert word in below, f"{place} names `trainyard {command} {word}`"


def test_commands_are_named_at_all() -> None:
    assert {command for command, _, _ in named_commands()} >= {"plan", "check", "releases"}
