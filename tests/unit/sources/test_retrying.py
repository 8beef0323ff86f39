"""How often and after which waits a request is made again."""

from __future__ import annotations

import pytest

from trainyard.errors import BadInput, Transient
from trainyard.sources import retrying
from trainyard.sources.retrying import Failure, Retries, wait_s


class Flaky:
    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def judge(error: Exception) -> Failure | None:
    if isinstance(error, OSError):
        return Failure(Transient("It failed."), retry_after_s=float(str(error) or 0))
    return Failure(BadInput("It is wrong.")) if isinstance(error, ValueError) else None


@pytest.fixture(autouse=True)
def _real_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "LONGEST_WAIT_S", 15.0)


def test_failures_that_pass_are_waited_for() -> None:
    waits: list[float] = []
    flaky = Flaky(OSError(), OSError("4"), OSError("900"), Transient("Ours."))
    assert Retries(5, waits.append).call(flaky, judge) == "done"
    assert waits == [0.5, 4.0, 15.0, 4.0]


def test_patience_ends() -> None:
    waits: list[float] = []
    flaky = Flaky(*[OSError() for _ in range(9)])
    with pytest.raises(Transient, match="It failed") as caught:
        Retries(3, waits.append).call(flaky, judge)
    assert isinstance(caught.value.__cause__, OSError)
    assert flaky.calls == 3
    assert waits == [0.5, 1.0]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(ValueError(), BadInput), (BadInput("x"), BadInput), (KeyError(), KeyError)],
)
def test_what_cannot_pass_is_raised_at_once(error: Exception, raised: type[Exception]) -> None:
    flaky = Flaky(error)
    with pytest.raises(raised):
        Retries(5, lambda _: None).call(flaky, judge)
    assert flaky.calls == 1


def test_waits_double_up_to_a_bound() -> None:
    assert [wait_s(n) for n in (1, 2, 3, 6, 5000)] == [0.5, 1.0, 2.0, 15.0, 15.0]
