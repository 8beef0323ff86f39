"""What a model's refreshes have asked for, so that each new revision is released once."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from trainyard.documents.base import Document, Frozen

KEPT_SUBJECTS = 50
"""Subjects that a record keeps; older ones are known by their releases."""


class RefreshAttempt(Frozen):
    """One run of `neuron_release` that a refresh asked for."""

    run_id: str
    asked_at: datetime
    asked_by: str = ""
    """The run of the refresh, or the user who called it."""
    state: Literal["", "success", "failed"] = ""
    """How it ended; empty: nobody has looked since."""


class RefreshSubject(Frozen):
    """A revision with a toolchain."""

    subject_id: str
    revision: str
    toolchain_id: str = ""
    attempts: tuple[RefreshAttempt, ...] = ()
    """Oldest first."""
    released: tuple[str, ...] = ()
    """Its releases, once they were seen, whoever asked for them."""


class RefreshRecord(Document):
    """`refreshes/<model>.json`, changed by compare-and-swap."""

    model: str
    subjects: tuple[RefreshSubject, ...] = ()
    """Oldest first, the last `KEPT_SUBJECTS`."""

    def subject(self, subject_id: str) -> RefreshSubject | None:
        """Return what is known of a subject, if anything is."""
        return next((each for each in self.subjects if each.subject_id == subject_id), None)
