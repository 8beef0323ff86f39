"""Canonical JSON and the digests that Trainyard's identities are made of."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Serialise `value` so that equal values give equal bytes.

    Keys are sorted, there is no white space, and non-ASCII text is kept as UTF-8.

    Raises:
        TypeError: `value` holds something JSON has no form for.
        ValueError: `value` holds NaN or an infinity.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def digest(value: Any) -> str:
    """Return the sha256 of the canonical JSON of `value`, as 64 lower-case hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def short(hex_digest: str) -> str:
    """Return the 12 hex digits by which people and file names know a digest."""
    return hex_digest[:12]
