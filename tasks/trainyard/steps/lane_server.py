"""A lane's server for the length of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from trainyard.documents.plan import PlannedTarget
from trainyard.errors import BadInput, CacheMiss, Refused, TrainyardError
from trainyard.lanes.neuron_toolchain import differences
from trainyard.lanes.protocol import Lane
from trainyard.lanes.start_check import refuse_misfit
from trainyard.serving.process import PortTaken, ServerProcess, explain_exit, free_port
from trainyard.steps.context import StepContext

_PORTS_TO_TRY = 5
_TAIL_LINES = 15
_REQUEST_TIMEOUT_S = 120.0
_MEMORY_SAMPLE_S = 1.0
_MISS_HINT = (
    "The bundle lacks code that this start needs. What differs between the two is in neither the "
    "compile key nor the files: the image, the node's settings, or a plugin that was changed."
)


@dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    process: ServerProcess
    ready_s: float
    """Seconds from its start to its first healthy answer, or until all was compiled."""
    answers: bool = True
    """False: it only compiles, and may have ended."""
    peak_memory_bytes: int | None = None
    """Most resident memory that its processes had together until it was ready, as seen every second
    or so; None: nobody could look."""

    def check(self) -> None:
        """Raise the reason if the server ended meanwhile."""
        if not self.process.alive():
            raise explain_exit(self.process.log_text(), self.process.exit_code)


def check_toolchain(lane: Lane, planned: PlannedTarget, context: StepContext) -> dict[str, str]:
    """Make sure that the toolchain is the planned one, which the compile key names; return it.

    Raises:
        BadInput: it changed since, or is missing.
    """
    now = lane.toolchain(context.settings.serving_interpreter)
    changed = differences(planned.toolchain, now, context.settings.image)
    if changed:
        raise BadInput(
            f"The serving environment is not the one of the plan: {'; '.join(changed)}.",
            hint="The compile key names the toolchain. Record that of the image with `trainyard "
            "toolchain`, if it runs in one, and plan again.",
        )
    return now


@contextmanager
def lane_server(
    lane: Lane,
    planned: PlannedTarget,
    context: StepContext,
    *,
    model_dir: Path,
    cache_dir: Path,
    served_model_name: str,
    cache_only: bool,
) -> Iterator[RunningServer]:
    """Start the lane's server, yield it once it answers, and stop all of it in the end.

    With `cache_only` the start fails rather than compiles, where the lane can do that. If it fails,
    the end of its log goes to the step's own log.

    Raises:
        CacheMiss: it ended because it found no compiled code, and was not allowed to compile.
        Refused, OutOfCapacity, StorageFull, Transient: it did not start.
    """
    if cache_only:
        refuse_misfit(lane, planned.target, cache_dir)
    for attempt in range(1, _PORTS_TO_TRY + 1):
        port = free_port()
        command = lane.command(
            planned.target,
            python=context.settings.serving_interpreter,
            model_dir=model_dir,
            cache_dir=cache_dir,
            served_model_name=served_model_name,
            port=port,
            cache_only=cache_only,
        )
        process = ServerProcess.start(
            command.argv, command.env, port=port, log_path=context.work_dir / "server.log"
        )
        try:
            try:
                ready_s, peak = _wait(
                    lane, process, context, command.answers, cache_only=cache_only
                )
            except PortTaken:
                if attempt == _PORTS_TO_TRY:
                    raise
                context.progress.say(f"Another process took port {port}; trying another one.")
                continue
            yield RunningServer(process, ready_s, command.answers, peak)
            return
        except TrainyardError as error:
            if not process.alive() and process.exit_code != 0:
                for line in process.log_tail(_TAIL_LINES):
                    context.progress.say(f"server: {line}")
            missed = lane.missed(process.log_text()) if cache_only else ""
            if missed and not isinstance(error, CacheMiss):
                raise CacheMiss(missed, hint=_MISS_HINT) from error
            raise
        finally:
            # Nobody waits for an answer any more; an orderly end would take vLLM five seconds.
            process.stop(0.0)


_KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 1, "seed": 1},
    {"temperature": 1, "top_p": 0.9, "top_k": 10},
    {"temperature": 0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
)
"""Each uses code of its own, which some servers compile when it is first needed: what is not asked
for while the bundle is made would be compiled while users wait."""


def ask(server: RunningServer, served_model_name: str) -> None:
    """Send one real request of each kind and check the answers; none to one that only compiles.

    Raises:
        Refused: the server does not answer as it should.
    """
    if not server.answers:
        return
    with httpx.Client(trust_env=False, timeout=_REQUEST_TIMEOUT_S) as client:
        for kind in _KINDS:
            # Token ids, because they mean something to every tokenizer.
            body = {"model": served_model_name, "prompt": [2, 3, 4, 5], "max_tokens": 8, **kind}
            response = _post(server, client, {**body, "ignore_eos": True})
            if response.status_code == 400 and kind is not _KINDS[0]:
                # A lane that does not sample, or returns no log-probs, has no code for it either.
                continue
            if response.status_code != 200 or not response.json().get("choices"):
                raise Refused(
                    f"The server answered a first request ({kind}) with {response.status_code}: "
                    f"{response.text[:200]}",
                    hint="Look at the end of the server's log.",
                )


def _post(server: RunningServer, client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    try:
        return client.post(f"{server.process.url}/v1/completions", json=body)
    except httpx.HTTPError as error:
        server.check()
        raise Refused(
            f"The server is healthy but does not answer a request: {error}.",
            hint="Look at the end of the server's log.",
        ) from error


def _wait(
    lane: Lane,
    process: ServerProcess,
    context: StepContext,
    answers: bool,
    *,
    cache_only: bool,
) -> tuple[float, int | None]:
    """Wait until the server is ready; return the seconds that took and the most memory it had."""
    told, began = "", time.monotonic()
    peak: int | None = None
    sampled = 0.0

    def tell(seconds: float, _line: str) -> None:
        nonlocal told, peak, sampled
        if peak is None or seconds - sampled >= _MEMORY_SAMPLE_S:
            peak, sampled = max(peak or 0, process.memory_bytes()), seconds
        stage = lane.stage(process.log_text())
        if stage != told:
            told = stage
            context.progress.say(f"Server: {stage}.")

    timeout_s = max(
        context.settings.server_start_timeout_s, lane.start_timeout_s(cache_only=cache_only)
    )
    try:
        seconds = process.wait_healthy(timeout_s, tell)
        # One that was ready at the first look has been looked at, too.
        tell(seconds, "")
        return seconds, peak
    except TrainyardError:
        if answers or process.alive() or process.exit_code != 0:
            raise
        return time.monotonic() - began, peak
