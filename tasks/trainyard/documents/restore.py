"""How far a restore of a release is: a file for those who wait for it, no document of the store."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from trainyard.documents.base import Frozen


class RestoreStatus(Frozen):
    """What `trainyard materialize --status FILE` writes."""

    release_id: str
    state: Literal["running", "done", "failed"] = "running"
    done_bytes: int = 0
    """In place; it becomes less if a file starts over."""
    total_bytes: int = 0
    """0 until it is known."""
    exit_code: int | None = None
    """0 done, else as in `trainyard.errors`; empty while it runs."""
    reason: str = ""
    """Why it failed, in one sentence."""
    hint: str = ""
    model_dir: str = ""
    """Where the checkpoint is, once it is done."""
    cache_dir: str = ""
    """Where the bundle is, once it is done."""
    updated_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
