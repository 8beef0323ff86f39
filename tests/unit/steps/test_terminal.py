from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trainyard.settings import Settings
from trainyard.steps.status import StatusWriter
from trainyard.steps.terminal import StepReporter
from trainyard.store.folder import FolderStore


class RecordedStatus(StatusWriter):
    def __init__(self, folder: Path) -> None:
        settings = Settings(home=folder)
        super().__init__(FolderStore(folder), settings, plan_id="p", step="s", target="")
        self.changes: dict[str, Any] = {}
        self.lines: list[str] = []

    def change(self, **changes: Any) -> None:
        self.changes.update(changes)

    def log(self, lines: Any) -> None:
        self.lines.extend(lines)


@pytest.fixture
def status(tmp_path: Path) -> RecordedStatus:
    return RecordedStatus(tmp_path)


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


def test_a_line_is_printed_as_it_is_and_kept(status: RecordedStatus, output: io.StringIO) -> None:
    reporter = StepReporter(Console(file=output, width=20), status)
    long = "[bold]not markup[/bold] :smile: /a/path 12:34 " + "x" * 100
    reporter.say(long)
    assert output.getvalue()[9:] == long + "\n"
    assert status.lines == [long]
    assert status.changes == {"reason": long}


def test_several_lines_stay_several(status: RecordedStatus, output: io.StringIO) -> None:
    StepReporter(Console(file=output), status).say("one\ntwo\n")
    assert [line[9:] for line in output.getvalue().splitlines()] == ["one", "two"]
    assert status.changes == {"reason": "two"}
    StepReporter(Console(file=output), status).say("")
    assert status.lines == ["one", "two"]


def test_progress_without_a_terminal_is_a_few_lines(
    status: RecordedStatus, output: io.StringIO
) -> None:
    reporter = StepReporter(Console(file=output), status)
    for n in range(1001):
        reporter.fraction(n / 1000, f"{n} of 1000")
    reporter.fraction(7.0)
    assert [line[9:] for line in output.getvalue().splitlines()] == [
        "  0% 0 of 1000",
        "100% 1000 of 1000",
        "100%",
    ]
    assert status.changes == {"progress": 1.0, "reason": "1000 of 1000"}
    reporter.fraction(-1)
    assert status.changes["progress"] == 0.0


def test_progress_on_a_terminal_is_a_bar(status: RecordedStatus, output: io.StringIO) -> None:
    reporter = StepReporter(Console(file=output, force_terminal=True, width=80), status)
    reporter.fraction(0.25, "a quarter")
    reporter.say("a line above the bar")
    reporter.fraction(1.0, "all")
    reporter.close()
    reporter.close()
    text = output.getvalue()
    assert "all" in text
    assert "100%" in text
    assert "a line above the bar" in text
    assert status.lines == ["a line above the bar"]


class ExitsOnBrokenPipe(Console):
    """As the real one, but leaves the standard output of the tests alone."""

    def on_broken_pipe(self) -> None:
        raise SystemExit(1)


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError])
def test_a_reader_that_went_away_is_no_failure(
    status: RecordedStatus, error: type[Exception]
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str, /) -> int:
            raise error

    StepReporter(ExitsOnBrokenPipe(file=Gone()), status).say("hello")
    assert status.lines == ["hello"]


def test_log_records_of_trainyard_come_too(status: RecordedStatus, output: io.StringIO) -> None:
    reporter = StepReporter(Console(file=output), status)
    logger = logging.getLogger("trainyard.somewhere")
    logger.info("before")
    with reporter.logging():
        logger.info("during")
        logger.debug("too much")
        logging.getLogger("another").warning("not ours")
    logger.warning("after")
    assert status.lines == ["during"]
