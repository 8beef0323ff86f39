"""What all commands have in common: how they print, fail, and get their settings."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from trainyard.errors import BadInput, TrainyardError
from trainyard.settings import Settings, get_settings

out = Console(emoji=False)
err = Console(stderr=True, emoji=False)


def fail(error: TrainyardError) -> NoReturn:
    """Print an error and what to do about it, and end with its code."""
    err.print(f"[bold red]Error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    if error.hint:
        err.print(f"[bold]What to do:[/] {escape(error.hint)}", highlight=False, soft_wrap=True)
    raise typer.Exit(error.exit_code)


def say(line: str) -> None:
    """Print a line as it is."""
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def show(what: RenderableType) -> None:
    """Print a table; square brackets in its cells are text."""
    out.print(what, markup=False, highlight=False)


def settings() -> Settings:
    """Return the settings, or end with a message that names the variables that are wrong."""
    from pydantic import ValidationError

    try:
        return get_settings()
    except ValidationError as error:
        problems = "; ".join(
            f"TRAINYARD_{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors()
        )
        fail(
            BadInput(
                f"The environment has wrong settings: {problems}.",
                hint="Correct or unset these variables.",
            )
        )
