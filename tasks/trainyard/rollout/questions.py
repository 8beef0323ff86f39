"""Asks the parts of the world that only tell something, and lives with whatever they raise.

A source that fails is a source that is away: a rollout holds, and then the blind rules act. That
must also be so if it fails as nobody foresaw (a page that no parser was written for, a defect of
ours): a driver that such an error ends has no sight, and no hands either. So the error is told,
once for each kind of it, and the rollout goes on. What stops a process (`KeyboardInterrupt`,
`SystemExit`, `CancelledError`) is no `Exception`, and nobody keeps it from doing so.

A store that is away ends a tick: without it nothing can be decided. But a document of it that only
tells something (a look, a history) and is damaged stays so however often it is read; it is asked
for here, with `unless=Transient`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

from trainyard.documents.look import DeviceCounters, PodCounters
from trainyard.errors import TrainyardError
from trainyard.rollout.metrics import MetricReader, Moment
from trainyard.serving.protocol import ServerStatus

log = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

COUNTERS = "the reader of counters"

_LONGEST = 200
"""Characters of an error's text that people are shown."""


class Questions:
    """Puts questions, and knows who failed at the last one."""

    def __init__(self) -> None:
        """Begin with nobody who failed."""
        self._failing: dict[str, str] = {}
        self._told: set[tuple[str, str]] = set()
        self._news: list[str] = []

    def ask(
        self,
        whom: str,
        question: Callable[[], AnswerT],
        *,
        otherwise: AnswerT,
        unless: type[Exception] | tuple[()] = (),
    ) -> AnswerT:
        """Return the answer, or `otherwise` if there is none.

        Args:
            whom: is asked, as a part of a sentence.
            question: raises what it likes.
            otherwise: means that nothing is known.
            unless: an error that the asker gets all the same.
        """
        try:
            answer = question()
        except unless:
            raise
        except (TrainyardError, OSError) as error:
            log.warning("%s cannot be asked: %s", whom, error)
            self._failing[whom] = _short(error)
        except Exception as error:
            self._failing[whom] = _short(error)
            kind = (whom, type(error).__name__)
            if kind not in self._told:
                self._told.add(kind)
                log.exception("%s failed in a way that nobody foresaw", whom)
                self._news.append(f"It goes on without {whom}, which failed with {_short(error)}")
        else:
            self._failing.pop(whom, None)
            return answer
        return otherwise

    def failure_of(self, whom: str) -> str:
        """Return how the last question to somebody failed; empty if it did not."""
        return self._failing.get(whom, "")

    def news(self) -> tuple[str, ...]:
        """Return the failures that nobody was told of yet, a line each."""
        news, self._news = tuple(self._news), []
        return news


class CarefulReader:
    """The `MetricReader` that keeps its promise never to raise, whatever the real one does."""

    def __init__(self, reader: MetricReader, questions: Questions) -> None:
        """Ask `reader`, through `questions`."""
        self._reader = reader
        self._questions = questions

    def read(self, environment: str, servers: Sequence[ServerStatus]) -> tuple[PodCounters, ...]:
        """Return the counters of those servers that could be read."""
        nothing: tuple[PodCounters, ...] = ()
        return self._questions.ask(
            COUNTERS, lambda: self._reader.read(environment, servers), otherwise=nothing
        )

    def devices(self, environment: str, pods: Sequence[PodCounters]) -> tuple[DeviceCounters, ...]:
        """Return what is known about errors of the accelerators of servers that were read."""
        nothing: tuple[DeviceCounters, ...] = ()
        return self._questions.ask(
            "the reader of device errors",
            lambda: self._reader.devices(environment, pods),
            otherwise=nothing,
        )

    def history(
        self, environment: str, servers: Sequence[ServerStatus], *, until: datetime
    ) -> tuple[Moment, ...] | None:
        """Return what the servers' counters were over the hours before `until`, oldest first."""
        return self._questions.ask(
            "the reader of counters' past",
            lambda: self._reader.history(environment, servers, until=until),
            otherwise=None,
        )


def _short(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text[:_LONGEST]}" if text else type(error).__name__
