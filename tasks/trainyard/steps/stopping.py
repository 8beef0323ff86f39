"""How a step is stopped from outside: signals, the death of its parent, the loss of its lock.

All of them end as one exception in the main thread, so that a step cleans up after itself (and
stops the servers it started) wherever it is. A step that does not end in time is ended the hard
way, with its child processes.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import psutil

from trainyard.errors import Transient

GRACE_S = 30.0
"""Seconds between the wish to stop and the hard end; Airflow kills a task 60 s after SIGTERM."""

_LAST_WORDS_S = 5.0
"""Seconds for the final status document of a step that is ended the hard way."""

_SIGNALS = {
    signal.SIGTERM: "Stopped by SIGTERM.",
    signal.SIGINT: "Stopped from the keyboard.",
    signal.SIGHUP: "Stopped because its terminal was closed.",
}

PARENT_GONE = "Stopped because the process that started it is gone."
LOCK_LOST = "Stopped because another process took over this step."


_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class StepStopped(BaseException):
    """The step was stopped from outside; no `except Exception` catches it."""


class Stopper:
    """Turns wishes to stop into `StepStopped` in the main thread; a context manager.

    Outside the main thread, where no signal handlers can be set, only `request` is noted.
    """

    def __init__(
        self,
        *,
        die_with_parent: bool = False,
        grace_s: float = GRACE_S,
        on_hard_end: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            die_with_parent: stop when standard input ends: its other end is in the parent's hands.
            grace_s: seconds between the wish and the hard end.
            on_hard_end: called with the reason just before the hard end.
        """
        self._die_with_parent = die_with_parent
        self._grace_s = grace_s
        self._on_hard_end = on_hard_end
        self._armed = False
        self._reason = ""
        self._mutex = threading.Lock()
        self._previous: dict[signal.Signals, _Handler] = {}
        self._watchdog: threading.Timer | None = None
        self._older_children: frozenset[psutil.Process] = frozenset()

    @property
    def reason(self) -> str:
        """Why it was stopped; empty if it was not."""
        return self._reason

    def request(self, reason: str) -> None:
        """Stop the step, from whatever thread."""
        with self._mutex:
            if self._reason or not self._armed:
                return
            self._reason = reason
        os.kill(os.getpid(), signal.SIGTERM)

    def disarm(self) -> None:
        """From here on the step is over: wishes to stop change nothing any more."""
        self._armed = False

    def __enter__(self) -> Stopper:
        """Set the handlers."""
        self._older_children = frozenset(psutil.Process().children())
        if threading.current_thread() is threading.main_thread():
            self._armed = True
            for number in _SIGNALS:
                previous = signal.getsignal(number)
                # `nohup` and background jobs of a shell ignore some signals: so do we then.
                if previous is not signal.SIG_IGN or number == signal.SIGTERM:
                    signal.signal(number, self._handle)
                    self._previous[number] = previous
        if self._die_with_parent:
            threading.Thread(
                target=self._await_end_of_stdin, name="death-pipe", daemon=True
            ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Set the previous handlers again; a stopped step leaves no child processes."""
        self._armed = False
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._reason:
            # The wish may have come between the start of a process and the `try` that ends it.
            self._end_children()
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._armed:
            return
        self._armed = False
        if not self._reason:
            self._reason = _SIGNALS[signal.Signals(number)]
        self._watchdog = threading.Timer(self._grace_s, self._end_hard)
        self._watchdog.daemon = True
        self._watchdog.start()
        raise StepStopped(self._reason)

    def _await_end_of_stdin(self) -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass
        self.request(PARENT_GONE)

    def _end_hard(self) -> None:
        """End this process and its children: the step did not react."""
        if self._on_hard_end is not None:
            reason = f"{self._reason} It did not end within {self._grace_s:.0f} s."
            # Of its own, because a store that hangs may be why the step does not react.
            last_words = threading.Thread(target=self._on_hard_end, args=(reason,), daemon=True)
            last_words.start()
            last_words.join(_LAST_WORDS_S)
        self._end_children()
        os._exit(Transient.exit_code)

    def _end_children(self) -> None:
        for child in psutil.Process().children():
            if child not in self._older_children:
                with suppress(psutil.NoSuchProcess):
                    for descendant in [*child.children(recursive=True), child]:
                        _kill(descendant)


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()
