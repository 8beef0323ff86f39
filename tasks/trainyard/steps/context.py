"""What a step gets to work with: settings, store, progress, scratch folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from trainyard.failures.tuning import Tuning
from trainyard.settings import Settings
from trainyard.store.protocol import Store


class Progress(Protocol):
    """Where a step reports what it is doing; goes to the terminal and to the status document."""

    def say(self, message: str) -> None:
        """Report one line about what happens now."""

    def fraction(self, done: float, message: str = "") -> None:
        """Report how far the step is, from 0 to 1."""


@dataclass(frozen=True)
class StepContext:
    """The surroundings of one run of one step."""

    settings: Settings
    store: Store
    progress: Progress
    work_dir: Path
    """Scratch folder of this step and target; kept between attempts, may be lost at any time."""
    force: bool = False
    tuning: Tuning = field(default_factory=Tuning)
    """What this try does differently, because earlier ones failed."""
    ensure_held: Callable[[], None] = lambda: None
    """Call it before a commit: raises Busy if this process lost the step's lock to another one."""


@dataclass(frozen=True)
class StepResult:
    """What a step made or found."""

    key: str
    """Key of its document."""
    reused: bool
    """It existed already; nothing was done."""
    message: str
    """One sentence for people."""
    detail: dict[str, object] = field(default_factory=dict)
