"""The trigger that drives a rollout, from taking the channel to the end of the bake.

It lives in the triggerer, so that a rollback needs no free worker: the wish "all to stable" is
written here, before any task runs. A triggerer that dies loses nothing: another one takes the
channel over with a higher epoch and goes on where the channel says the rollout stands.

Each rollout has a thread of its own. A triggerer has few threads for all its triggers together, and
rollouts that wait for something slow (servers that warm up, a store that does not answer) would
keep the others from renewing their leases.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from airflow.triggers.base import BaseTrigger, TriggerEvent

if TYPE_CHECKING:
    from trainyard.errors import Closed
    from trainyard.wiring import Kind, Tick

T = TypeVar("T")

LONGEST_WAIT_S = 300.0
"""Seconds between two looks at an environment that is closed."""

RETRY_AFTER_S = 2.0
"""Pause after a failure that may pass (the store is away for a moment)."""

BEGIN_WITHIN_S = 900.0
"""Seconds for which a rollout is tried that cannot begin for such a failure: long enough for a
store that comes back, short enough that people hear of one that does not."""


class RolloutTrigger(BaseTrigger):
    """Drive one rollout to its end.

    Args:
        environment: name of the environment.
        kind: `promote` or `rollback`.
        request: the run's params as JSON (templated by Airflow when it starts in the triggerer).
        requested_by: who asked for it.
        run_id: the run that owns the rollout.
        known_keys: what the request may hold; empty: not checked.
    """

    def __init__(
        self,
        *,
        environment: str,
        kind: Kind,
        request: str,
        requested_by: str,
        run_id: str,
        known_keys: Sequence[str] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.environment = environment
        self.kind = kind
        self.request = request
        self.requested_by = requested_by
        self.run_id = run_id
        self.known_keys = list(known_keys)

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what another triggerer needs to go on."""
        return (
            "trainyard_airflow.rollout_trigger.RolloutTrigger",
            {
                "environment": self.environment,
                "kind": self.kind,
                "request": self.request,
                "requested_by": self.requested_by,
                "run_id": self.run_id,
                "known_keys": self.known_keys,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Tick until the rollout has an outcome, then fire it."""
        from trainyard.errors import Closed, TrainyardError

        said = ""
        own_thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        try:
            drive = await self._begin(own_thread)
            while True:
                try:
                    result = await _run_in(own_thread, drive)
                except Closed as closed:
                    # The turn of a request that waited for the channel has come in such a window.
                    await self._wait_for_window(closed)
                    continue
                except TrainyardError as error:
                    if not error.retryable:
                        raise
                    self.log.warning("%s Trying again.", error)
                    await asyncio.sleep(RETRY_AFTER_S)
                    continue
                for line in result.messages:
                    if line != said:
                        self.log.info("%s", line)
                        said = line
                if result.done:
                    break
                await asyncio.sleep(result.next_in_s)
        except TrainyardError as error:
            yield TriggerEvent({"outcome": "refused", "message": str(error)})
            return
        finally:
            # Nobody waits for a tick under way: a triggerer that is told to stop must.
            own_thread.shutdown(wait=False, cancel_futures=True)
        yield TriggerEvent({"outcome": result.outcome, "message": result.summary})

    async def _begin(self, own_thread: ThreadPoolExecutor) -> Tick:
        """Take the channel; if the request says so, wait while the environment is closed.

        The task before has waited for that, too; this is for a window that began since, for
        example while people were asked for their approval. What fails for the moment is tried
        again: the task has no retries, and a rollback must not die of one lost request.
        """
        from trainyard.errors import Busy, Closed, TrainyardError, Transient

        failing_since: float | None = None
        while True:
            try:
                return await _run_in(own_thread, self._start)
            except Closed as closed:
                await self._wait_for_window(closed)
                failing_since = None
            except TrainyardError as error:
                failing_since = failing_since if failing_since is not None else time.monotonic()
                failed_s = time.monotonic() - failing_since
                if not error.retryable or isinstance(error, Busy):
                    raise
                if failed_s >= BEGIN_WITHIN_S:
                    raise Transient(
                        f"It could not begin, which was tried for {failed_s:.0f} s: {error}",
                        hint="Ask again once that works; `trainyard status` shows where it stands.",
                    ) from error
                self.log.warning(
                    "The %s cannot begin yet: %s Trying again, for %.0f s more.",
                    "rollback" if self.kind == "rollback" else "rollout",
                    error,
                    BEGIN_WITHIN_S - failed_s,
                )
                await asyncio.sleep(RETRY_AFTER_S)

    async def _wait_for_window(self, closed: Closed) -> None:
        """Wait until an environment may be open again; raises `closed` if nobody wants to wait."""
        if not json.loads(self.request).get("wait_for_window"):
            raise closed
        self.log.info("%s Waiting until %s.", closed.message, closed.until)
        left_s = (closed.until - datetime.now(UTC)).total_seconds()
        await asyncio.sleep(min(max(left_s, RETRY_AFTER_S), LONGEST_WAIT_S))

    def _start(self) -> Tick:
        """Take the channel and return the function that makes one tick."""
        from functools import partial

        from trainyard.errors import BadInput
        from trainyard.settings import get_settings
        from trainyard.wiring import open_rollout
        from trainyard_airflow.notify import tell_rollout_event

        params = json.loads(self.request)
        unknown = sorted(set(params) - set(self.known_keys))
        if self.known_keys and unknown:
            raise BadInput(
                f"The conf of this run has unknown keys: {', '.join(unknown)}.",
                hint=f"Known are: {', '.join(self.known_keys)}.",
            )
        notify = partial(tell_rollout_event, run=self.run_id)
        return open_rollout(get_settings(), notify=notify).begin(
            kind=self.kind,
            model=params["model"],
            environment=self.environment,
            release_id=params.get("release") or None,
            force=bool(params.get("force")),
            reason=params.get("reason") or "",
            requested_by=self.requested_by,
            run_id=self.run_id,
        )


async def _run_in(thread: ThreadPoolExecutor, act: Callable[[], T]) -> T:
    """Return what `act` does in a thread, in the present context: Airflow's logs go by that."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(thread, context.run, act)
