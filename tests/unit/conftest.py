"""What all unit tests share: what takes long and comes to the same each time is made once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import pytest
import typer.main
import typer.testing

from trainyard.gates import verdict as verdicts
from trainyard.gates.expectations import Evaluation, Expectation, evaluate


@pytest.fixture(scope="session", autouse=True)
def remembered_evaluations() -> Iterator[None]:
    """Let gates and publications remember what Great Expectations made of the same expectations.

    It takes a fifth of a second each time, and equal expectations come to equal results, which the
    tests of expectations themselves show: they ask it anew.
    """
    made: dict[tuple[str, str], Evaluation] = {}

    def remembered(name: str, expectations: Sequence[Expectation]) -> Evaluation:
        # Their text, in which also NaN, 1 and 1.0 are what they are.
        asked = (name, repr(tuple(expectations)))
        if asked not in made:
            made[asked] = evaluate(name, expectations)
        return replace(made[asked], result=copy.deepcopy(made[asked].result))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdicts, "evaluate", remembered)
        yield


@pytest.fixture(scope="session", autouse=True)
def command_line_made_once() -> Iterator[None]:
    """Let typer's runner keep the commands that it makes of an app anew for every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", cache(typer.main.get_command))
        yield
