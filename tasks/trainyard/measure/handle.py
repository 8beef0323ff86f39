"""The measuring process as its parent sees it."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from pydantic import ValidationError

from trainyard.documents.parity import Reference
from trainyard.errors import BadInput, OutOfCapacity, Refused, TrainyardError
from trainyard.measure.job import EVENTS, Failure, Job, Made, Outcome, Progress, Ready
from trainyard.serving.process import base_environment

_LOOK_S = 0.5
"""Seconds between two looks at the server while nothing is reported."""

Event = Ready | Progress | Made | Outcome | Failure


class MeasuringProcess:
    """Starts the process, which then imports, and hands it the job; a context manager."""

    def __init__(self, python: Path, *, work_dir: Path) -> None:
        """Start it.

        Args:
            python: the serving interpreter.
            work_dir: its working folder; `measure.log` and caches of data sets go there.

        Raises:
            BadInput: the interpreter cannot be run.
        """
        self.log_path = work_dir / "measure.log"
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        env = {
            **base_environment(),
            # Tokens and mirrors of data sets that a task may need to fetch.
            **{name: value for name, value in os.environ.items() if name.startswith("HF_")},
            "HF_DATASETS_CACHE": str(work_dir / "datasets"),
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "PYTHONUNBUFFERED": "1",
        }
        try:
            with self.log_path.open("wb") as log:
                self._child = subprocess.Popen(
                    [str(python.absolute()), "-P", "-m", "trainyard.measure.job"],
                    env=env,
                    cwd=work_dir,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    encoding="utf-8",
                )
        except OSError as error:
            raise BadInput(
                f"The serving environment's Python ({python}) cannot be run: {error.strerror}.",
                hint="Run `make setup`, or set TRAINYARD_SERVE_PYTHON to a Python that has vLLM.",
            ) from error
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._stdin: IO[str] = self._child.stdin
        self._reader = threading.Thread(
            target=self._read, args=(self._child.stdout,), name="figures", daemon=True
        )
        self._reader.start()

    def run(
        self,
        job: Job,
        *,
        on_progress: Callable[[float, str], None],
        check_server: Callable[[], None],
        on_reference: Callable[[Reference], None] = lambda made: None,
    ) -> Outcome:
        """Measure and return the figures.

        Args:
            job: what to measure; its server answers already.
            on_progress: told the fraction (0 to 1) and what is measured now.
            check_server: called now and then; raises if the server is gone.
            on_reference: given the reference of the parity check if one was made.

        Raises:
            BadInput: a task or metric of the spec does not exist, or packages are missing.
            Refused: harness or benchmark failed.
            OutOfCapacity: the process was killed.
        """
        # A process that ended already has said why.
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(job.model_dump_json() + "\n")
            self._stdin.flush()
        while True:
            try:
                event = self._events.get(timeout=_LOOK_S)
            except queue.Empty:
                check_server()
                continue
            match event:
                case Progress():
                    on_progress(event.fraction, event.message)
                case Made():
                    on_reference(event.reference)
                case Outcome():
                    return event
                case Failure():
                    check_server()
                    kind = BadInput if event.bad_input else Refused
                    raise kind(event.message, hint=f"{event.hint} ({self.log_path})")
                case None:
                    check_server()
                    raise self._ended()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def __enter__(self) -> MeasuringProcess:
        """Nothing to do: it runs since it was made."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End it; what it has not reported is lost."""
        self._child.kill()
        self._child.wait()
        self._reader.join()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def _read(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                try:
                    self._events.put(EVENTS.validate_json(line))
                except ValidationError:
                    # Half a line of a process that was killed; its end follows.
                    continue
        self._events.put(None)

    def _ended(self) -> TrainyardError:
        code = self._child.wait()
        lines = self.log_path.read_text(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "(it wrote nothing)")
        if code < 0:
            return OutOfCapacity(
                f"The measuring process was ended by signal {-code}, most likely by the kernel for "
                "lack of memory.",
                hint="Free memory, then try again.",
            )
        return Refused(
            f"The measuring process failed with exit code {code}: {last}",
            hint=f"Read {self.log_path}.",
        )
