"""The Neuron devices of the machine that this process runs on, without AWS's tools."""

from __future__ import annotations

from pathlib import Path

VERSION_FILE = Path("/sys/module/neuron/version")
"""The kernel module says its version here, in containers too."""


def driver_version() -> str:
    """Return the version of the machine's Neuron driver; empty if there is none."""
    try:
        return VERSION_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
