"""Axes of charts: from values to places in the drawing, with marks at round values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainyard.reports.charts import Tick

_STEPS = (1.0, 2.0, 5.0, 10.0)
_LARGE = 10_000.0


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis over `length` units; a vertical one runs from the bottom up."""

    low: float
    high: float
    length: float
    is_log: bool = False
    is_vertical: bool = False

    def place(self, value: float) -> float:
        """Return where a value is; values beyond the ends are put there."""
        inside = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return round(self.length * (1 - share if self.is_vertical else share), 1)

    def ticks(
        self, count: int = 5, words: Callable[[float], str] | None = None
    ) -> tuple[Tick, ...]:
        """Return about `count` marks at 1, 2 or 5 times powers of ten, with the values as text.

        Args:
            count: how many fit.
            words: makes text of a value; `figure` unless given.
        """
        values = _log_values(self.low, self.high) if self.is_log else self._linear_values(count)
        if self.is_log and len(values) > count:
            # Powers of ten alone; of those as few as asked for.
            tens = [value for value in values if _is_power(value)]
            values = tens[:: math.ceil(len(tens) / count)] if len(tens) > 1 else values[::2]
        return tuple(Tick(self.place(value), (words or figure)(value)) for value in values)

    def _linear_values(self, count: int) -> list[float]:
        step = round_up((self.high - self.low) / count)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def linear_axis(values: Sequence[float], length: float, *, is_vertical: bool = False) -> Axis:
    """Return an axis from 0 to a little above the largest of `values`."""
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    return Axis(0.0, round_up(largest * 1.05 or 1.0, fine=True), length, is_vertical=is_vertical)


def log_axis(values: Sequence[float], length: float, *, is_vertical: bool = False) -> Axis:
    """Return an axis that holds all positive `values`, ending at round values."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    low, high = min(positive, default=1.0), max(positive, default=10.0)
    bottom, top = _round_down(low), round_up(high)
    if top <= bottom:
        top = round_up(bottom * 1.5)
    return Axis(bottom, top, length, is_log=True, is_vertical=is_vertical)


def round_up(value: float, *, fine: bool = False) -> float:
    """Return the least 1, 2 or 5 times a power of ten (or any multiple, if `fine`) that is not
    less than a positive `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    if fine:
        return math.ceil(value / power - 1e-9) * power
    return next(step * power for step in _STEPS if step * power >= value * (1 - 1e-9))


def figure(value: float) -> str:
    """Return a value as an axis is labelled with it: three digits, no exponent for common sizes."""
    if value == 0:
        return "0"
    if abs(value) >= _LARGE or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _round_down(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return max(step * power for step in _STEPS if step * power <= value * (1 + 1e-9))


def _log_values(low: float, high: float) -> list[float]:
    found, power = [], 10.0 ** math.floor(math.log10(low))
    while power <= high * (1 + 1e-9):
        found += [
            step * power
            for step in _STEPS[:3]
            if low * (1 - 1e-9) <= step * power <= high * (1 + 1e-9)
        ]
        power *= 10
    return found


def _is_power(value: float) -> bool:
    exponent = math.log10(value)
    return math.isclose(exponent, round(exponent), abs_tol=1e-9)
