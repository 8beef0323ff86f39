"""The log of a process that runs for long, as its supervisor or its pod keeps it."""

from __future__ import annotations

import logging


def log_to_stderr() -> None:
    """Write what happens to standard error, one line an event."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # It would write a line for every request, and bury everything else.
    logging.getLogger("httpx").setLevel(logging.WARNING)
