"""Numbers in sentences are short and exact enough."""

from __future__ import annotations

import math

import pytest

from trainyard.gates.words import number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (400.0, "400"),
        (0.0, "0"),
        (-0.0, "0"),
        (0.95, "0.95"),
        (123.456789, "123.457"),
        (1234567.0, "1234567"),
        (0.1 + 0.2, "0.3"),
        (1e20, "1e+20"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text
