"""What a running step says, on the terminal and in its status document."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from trainyard.steps.status import StatusWriter, clean_lines

_PLAIN_INTERVAL_S = 5.0
"""Where there is no terminal, progress is a line of its own: so many seconds between two."""


def print_line(console: Console, line: str) -> None:
    """Print one line as it is. A reader that went away is no reason for a step to fail."""
    try:
        console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
    except (OSError, ValueError, SystemExit):
        # Gone, closed, or of another encoding. Rich answers a broken pipe with the wish to exit.
        return


class StepReporter:
    """The `Progress` of a step: one line an event, and a bar if there is a terminal."""

    def __init__(self, console: Console, status: StatusWriter) -> None:
        """Report to both."""
        self._console = console
        self._status = status
        self._mutex = threading.RLock()
        self._bar: Progress | None = None
        self._shown_at = -_PLAIN_INTERVAL_S

    def say(self, message: str) -> None:
        """Report one line about what happens now."""
        lines = clean_lines(message)
        if not lines:
            return
        self.note(lines)
        self._status.change(reason=lines[-1])

    def note(self, lines: list[str]) -> None:
        """Put lines into the log only; they are not what the step does now."""
        self._status.log(lines)
        with self._mutex:
            for line in lines:
                print_line(self._console, f"{datetime.now():%H:%M:%S} {line}")

    def fraction(self, done: float, message: str = "") -> None:
        """Report how far the step is, from 0 to 1; values outside are cut."""
        share = min(max(done, 0.0), 1.0)
        text = " ".join(clean_lines(message))
        self._status.change(progress=share, **({"reason": text} if text else {}))
        with self._mutex:
            if self._console.is_terminal:
                self._show_bar(share, text)
            elif monotonic() - self._shown_at >= _PLAIN_INTERVAL_S or share == 1.0:
                self._shown_at = monotonic()
                self.note([f"{share:4.0%} {text}".rstrip()])

    def close(self) -> None:
        """Take the bar off the terminal."""
        with self._mutex:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Let log records of Trainyard's own modules come here too."""
        logger = logging.getLogger("trainyard")
        handler = _ReporterHandler(self)
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(min(level, logging.INFO) if level else logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)

    def _show_bar(self, share: float, text: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("", total=1.0)
            self._bar.start()
        task = self._bar.tasks[0]
        self._bar.update(task.id, completed=share, description=text or task.description)


class _ReporterHandler(logging.Handler):
    def __init__(self, reporter: StepReporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.note(clean_lines(self.format(record)))
