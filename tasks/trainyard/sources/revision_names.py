"""Folders whose names are revisions, and which of them is the newest."""

from __future__ import annotations

import re

from trainyard.errors import BadInput
from trainyard.names import check_revision


def is_revision(name: str) -> bool:
    """Tell whether a folder of that name can be a revision."""
    try:
        check_revision(name)
    except BadInput:
        return False
    return True


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key by which v10 comes after v9."""
    parts = re.findall(r"\d+|\D+", name)
    # The name itself comes last, so that v1 and v01 still have an order.
    return (*((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts), (-1, 0, name))
