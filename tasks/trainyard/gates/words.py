"""Words and numbers that the gates' sentences share."""

from __future__ import annotations

import math

NO_BASELINE = "There is no stable release to compare with."

ROUNDING_DIGITS = 9
"""Bounds that are computed from a stable figure are rounded to so many decimals, so that a figure
exactly at its bound passes: 0.3 - 0.1 is 0.19999999999999998 in floating point."""


def number(value: float) -> str:
    """Return `value` as people write it: six significant digits, no exponent for common sizes."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.6g}"
