"""Status documents: progress and outcome of a step, for people, the UI and retries."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from trainyard.documents.base import Document


class StepStatus(Document):
    """`status/<plan id>/<step>[/<target>].json`; the last writer wins."""

    plan_id: str
    step: str
    target: str = ""
    state: Literal["running", "done", "failed"]
    attempt: int = 1
    exit_code: int | None = None
    """0 done, else as in `trainyard.errors`; empty while it runs."""
    reason: str = ""
    """What it does now, or why it ended, in one sentence."""
    hint: str = ""
    code: str = ""
    """The known failure that ended it (see docs/failures.md); empty: none that is known."""
    tuning: dict[str, int] = Field(default_factory=dict)
    """Settings that are not the spec's: this try's while it runs, the next one's once it failed."""
    progress: float | None = None
    """0 to 1, where the step can tell."""
    output_key: str = ""
    """Key of the document that the step made or found."""
    reused: bool = False
    """The output existed already; nothing was done."""
    started_at: datetime
    updated_at: datetime
    log_tail: tuple[str, ...] = ()
    """Last lines of the log, oldest first; everything the step printed about itself."""
    detail: dict[str, Any] = Field(default_factory=dict)
