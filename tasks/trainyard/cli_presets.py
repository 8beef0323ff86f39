"""`trainyard presets …`: model specs to copy, each after a recipe that AWS publishes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trainyard.console import fail, say, settings, show
from trainyard.errors import BadInput, TrainyardError

presets_app = typer.Typer(
    help="Model specs to copy, each after a recipe that AWS publishes.", no_args_is_help=True
)

NameArgument = Annotated[str, typer.Argument(help="Name of the preset.", show_default=False)]


@presets_app.command()
def ls() -> None:
    """List the presets with their sources, and what has none yet, with the reason."""
    from trainyard.presets.known import NOT_YET, presets

    table = Table("Preset", "Targets", "Source")
    for each in presets():
        targets = [f"{target.lane} on {target.instance}" for target in each.spec.targets]
        table.add_row(each.name, "\n".join(targets), each.source)
    show(table)
    later = Table("Not yet", "Where", "Why", "Source")
    for missing in NOT_YET:
        later.add_row(missing.what, missing.where, missing.reason, missing.source)
    show(later)


@presets_app.command("show")
def show_(
    name: NameArgument,
    commands: Annotated[
        bool,
        typer.Option(
            "--commands",
            help="Instead of the spec: what compiles and serves each target, as shell scripts with "
            "the source of each line.",
        ),
    ] = False,
) -> None:
    """Print a preset."""
    from trainyard.presets.commands import scripts
    from trainyard.presets.known import preset

    try:
        found = preset(name)
        if not commands:
            sys.stdout.write(found.text)
            return
        for script in scripts(found).values():
            say(script)
    except TrainyardError as error:
        fail(error)


@presets_app.command()
def write(
    name: NameArgument,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file if it is there.")
    ] = False,
) -> None:
    """Copy a preset into the catalogue (TRAINYARD_CATALOGUE), to be changed there."""
    from trainyard.presets.known import preset

    try:
        found = preset(name)
        path: Path = settings().catalogue / found.path.name
        if path.exists() and not force:
            raise BadInput(f"{path} exists already.", hint="Give --force to replace it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found.text, encoding="utf-8")
    except TrainyardError as error:
        fail(error)
    say(f"Wrote {path}. Set its owner and its bounds, then: trainyard check {path}")
