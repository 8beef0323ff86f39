"""`trainyard judge`: what the judge said, or would have said, after every look at a log."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from trainyard.console import fail, say, settings, show
from trainyard.errors import BadInput, TrainyardError

if TYPE_CHECKING:
    from trainyard.documents.evidence import Block, JudgeSpec, MetricVerdict, Verdict


def judge(
    blocks: Annotated[
        Path | None, typer.Option("--blocks", help="File of blocks, one JSON object a line.")
    ] = None,
    spec: Annotated[
        Path | None,
        typer.Option(
            "--spec",
            help="YAML or JSON file with the judge's specification. With --rollout: another one "
            "than the rollout had.",
        ),
    ] = None,
    rollout: Annotated[
        tuple[str, str, int] | None,
        typer.Option(
            "--rollout",
            metavar="MODEL ENVIRONMENT N",
            help="A rollout of the store, over or not, in place of a file.",
        ),
    ] = None,
    save_blocks: Annotated[
        Path | None, typer.Option("--save-blocks", help="Write the blocks to this file as well.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every verdict as one line of JSON.")
    ] = False,
) -> None:
    """Replay a log of blocks: print the judge's verdict after every look.

    It reads only; nothing is moved by it.
    """
    from trainyard.rollout.block_log import dump_blocks

    try:
        log, judge_spec, ending = _log(blocks, spec, rollout)
        if save_blocks is not None:
            _write(save_blocks, dump_blocks(log))
        last = _replay(log, judge_spec, as_json=as_json)
    except TrainyardError as error:
        fail(error)
    if not as_json:
        show(_table(last))
        if ending:
            say(ending)


def _replay(log: list[Block], judge_spec: JudgeSpec, *, as_json: bool) -> Verdict:
    """Print the verdict after every look, and return the last one.

    Raises:
        BadInput: the log has no look, or figures with which nobody can compute.
    """
    import numpy as np

    from trainyard.rollout.judge import replay

    last: Verdict | None = None
    try:
        # A verdict has no figure that is not finite: what overflows ends in an error, and needs no
        # warning besides.
        with np.errstate(over="ignore", invalid="ignore"):
            for verdict in replay(log, judge_spec):
                last = verdict
                if as_json:
                    sys.stdout.write(verdict.model_dump_json() + "\n")
                else:
                    say(f"{verdict.at:8.0f} s  {verdict.outcome:12}  {verdict.reason}")
    except (ValueError, ArithmeticError) as error:
        # Each figure is a number, and some are of no use together, such as variances of 1e300.
        what = str(error).strip().splitlines() or [""]
        raise BadInput(
            f"The judge cannot compute with these figures ({type(error).__name__}: {what[0]}).",
            hint="Look for numbers out of all proportion: `covariance` and margins in the "
            "specification, `total` (in seconds), `requests` and `t` in the blocks.",
        ) from error
    if last is None:
        raise BadInput(
            "The log has nothing but history: no block ends after the first exposure.",
            hint="Blocks of the comparison have `t` above 0.",
        )
    return last


def _log(
    blocks: Path | None, spec: Path | None, rollout: tuple[str, str, int] | None
) -> tuple[list[Block], JudgeSpec, str]:
    """Return the blocks, what they are judged by, and how their rollout ended if it is known."""
    from trainyard.rollout.block_log import parse_blocks, stored_log
    from trainyard.store.factory import open_store

    if (blocks is None) == (rollout is None):
        raise BadInput(
            "Either a file of blocks or a rollout is needed.",
            hint="Use --blocks FILE --spec FILE, or --rollout MODEL ENVIRONMENT N.",
        )
    if rollout is not None:
        stored = stored_log(open_store(settings()), *rollout)
        return stored.blocks, stored.spec if spec is None else _spec(spec), stored.ending
    if spec is None:
        raise BadInput(
            "A file of blocks says nothing about margins.",
            hint="Name the specification with --spec; `max_duration_s: 1800` is enough for one.",
        )
    assert blocks is not None
    return parse_blocks(_read(blocks), name=str(blocks)), _spec(spec), ""


def _spec(path: Path) -> JudgeSpec:
    import yaml

    from trainyard.rollout.block_log import parse_judge_spec

    try:
        values = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is neither YAML nor JSON: {error}", hint="Mend it.") from error
    return parse_judge_spec(values, name=str(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}", hint="Name a text file.") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error}", hint="Name another file.") from error


def _table(verdict: Verdict) -> Table:
    table = Table(title=f"{verdict.outcome} after {verdict.exposed_requests} exposed requests")
    for head in ("metric", "outcome", "stable", "candidate", "harm", "good enough", "requests"):
        table.add_column(head)
    for one in verdict.metrics:
        table.add_row(
            one.metric,
            one.standing,
            _value(one.stable_value),
            _value(one.candidate_value),
            f"{one.harm_evidence:.2f} of {one.harm_threshold:.2f}",
            "-" if one.harm_only else f"{one.promote_evidence:.2f} of {one.promote_threshold:.2f}",
            _requests(one),
        )
    return table


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _requests(one: MetricVerdict) -> str:
    return f"{one.candidate_requests} and {one.stable_requests} in {one.blocks} blocks"
