"""Questions to those who only tell something: whatever they raise, the asker goes on."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import pytest
from tests.unit.rollout.machine import NOW

from trainyard.errors import Transient
from trainyard.rollout.metrics import MetricReader
from trainyard.rollout.questions import COUNTERS, CarefulReader, Questions


def raising(error: BaseException) -> Any:
    def question(*_: object, **__: object) -> Any:
        raise error

    return question


@pytest.mark.parametrize("error", [Transient("It is away."), TimeoutError("late")])
def test_who_is_away_is_logged_and_no_news(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    questions = Questions()
    assert questions.ask("the router", raising(error), otherwise=None) is None
    assert questions.failure_of("the router").startswith(type(error).__name__)
    assert questions.news() == ()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_an_error_that_nobody_foresaw_is_told_once_for_each_kind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    questions = Questions()
    for error in (KeyError("le"), KeyError("le"), ValueError("NaN"), ZeroDivisionError()):
        assert questions.ask("the router", raising(error), otherwise=7) == 7
    assert questions.news() == (
        "It goes on without the router, which failed with KeyError: 'le'",
        "It goes on without the router, which failed with ValueError: NaN",
        "It goes on without the router, which failed with ZeroDivisionError",
    )
    assert questions.news() == ()
    assert [record.exc_info is not None for record in caplog.records] == [True] * 3


def test_who_answers_again_has_not_failed() -> None:
    questions = Questions()
    questions.ask("the router", raising(KeyError("le")), otherwise=None)
    questions.ask("the host", raising(KeyError("le")), otherwise=None)
    assert questions.ask("the router", lambda: 3, otherwise=0) == 3
    assert questions.failure_of("the router") == ""
    assert questions.failure_of("the host") == "KeyError: 'le'"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_what_stops_a_process_stops_it(error: type[BaseException]) -> None:
    with pytest.raises(error):
        Questions().ask("the router", raising(error()), otherwise=None)


def test_long_texts_of_errors_are_cut() -> None:
    questions = Questions()
    questions.ask("the router", raising(ValueError("x" * 5000)), otherwise=None)
    assert len(questions.failure_of("the router")) < 300


def test_a_careful_reader_knows_nothing_where_the_real_one_raises() -> None:
    class Broken:
        read = devices = history = staticmethod(raising(LookupError("a strange page")))

    questions = Questions()
    reader = CarefulReader(cast(MetricReader, Broken()), questions)
    assert reader.read("production", []) == ()
    assert reader.devices("production", []) == ()
    assert reader.history("production", [], until=NOW) is None
    assert questions.failure_of(COUNTERS) == "LookupError: a strange page"
    assert len(questions.news()) == 3
