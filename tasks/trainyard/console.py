"""What all commands have in common: how they print, fail, and get their settings."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from trainyard.errors import BadInput, TrainyardError, Transient
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
    """Print a line as it is. A command whose lines nobody can read goes on with its work."""
    try:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    except OSError as error:
        _close_output()
        if isinstance(error, BrokenPipeError):
            # Whoever read them has seen enough.
            return
        with contextlib.suppress(OSError):
            err.print(f"{_lost(error)} It goes on without.", markup=False, soft_wrap=True)


def show(what: RenderableType) -> None:
    """Print a table; square brackets in its cells are text. Ends if it cannot be."""
    try:
        out.print(what, markup=False, highlight=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        _close_output()
        fail(Transient(_lost(error), hint="Send it to where there is room."))


def show_json(value: Any) -> None:
    """Print a value for programs. Ends if it cannot be."""
    try:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _close_output()
        fail(Transient(_lost(error), hint="Send it to where there is room."))


def _lost(error: OSError) -> str:
    return f"Standard output cannot be written: {error.strerror or error}."


def _close_output() -> None:
    """Send what is still to be printed nowhere, so that it does not fail again, and at the end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


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
