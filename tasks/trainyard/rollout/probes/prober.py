"""The thread that sends probes while a rollout's driver wants them.

It never keeps the driver waiting, and it dies with it: probes are sent only in the window that the
driver opened last, and the thread is gone when its process is. A process that goes on with the
rollout begins with counters of its own, at the cursor that the last look has.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import httpx

from trainyard.documents.channel import ProbePlan
from trainyard.documents.look import ProbeReading
from trainyard.rollout.probes.answers import Answer, Prompt, compare
from trainyard.rollout.probes.asking import ask
from trainyard.rollout.probes.schedule import Round, Schedule
from trainyard.rollout.probes.tally import Tally
from trainyard.serving.protocol import ServerStatus
from trainyard.serving.route import IDLE_CONNECTION_S

log = logging.getLogger(__name__)

_LIMITS = httpx.Limits(keepalive_expiry=IDLE_CONNECTION_S)
"""A probe on a connection that is just being closed would count as an error of the release."""

_RECENT = 50
"""Newest rounds that tell how long answers take."""


@dataclass(frozen=True)
class Wish:
    """What is to be probed, and how long."""

    rollout: str
    """Names the rollout; another one begins anew."""
    plan: ProbePlan
    prompts: Sequence[Prompt]
    model: str
    """The name that clients use."""
    stable: Sequence[ServerStatus]
    """Ready servers, at least one, as of `candidate`."""
    candidate: Sequence[ServerStatus]
    cursor: int
    """Where to begin, if this process has not begun yet."""
    send_s: float
    """Seconds from now on in which probes may be sent; 0: none."""
    rounds_per_s: float
    """How many a second."""


class Prober(Protocol):
    """Sends probes."""

    def keep(self, wish: Wish) -> None:
        """Go on as `wish` says, until another one is given or its time is over; returns at once."""

    def stop(self) -> None:
        """Send nothing more until the next wish; returns at once."""

    def read(self, rollout: str) -> ProbeReading | None:
        """Return the counters of now; None if nobody ever wished for probes of that rollout."""

    def slowest_s(self, rollout: str) -> float:
        """Return how long the slowest of the newest rounds took; 0 if there was none."""


class NoProber:
    """Sends nothing; for whoever drives rollouts that have no probes."""

    def keep(self, wish: Wish) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def read(self, rollout: str) -> ProbeReading | None:
        """Return nothing."""
        return None

    def slowest_s(self, rollout: str) -> float:
        """Return 0."""
        return 0.0


@dataclass
class _Session:
    """One rollout, in this process."""

    wish: Wish
    schedule: Schedule
    until: float
    epoch: str = field(default_factory=lambda: secrets.token_hex(8))
    tally: Tally = field(default_factory=Tally)
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    thread: threading.Thread | None = None


class HttpProber:
    """Sends probes from a thread of its own, straight to the servers."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing to send."""
        self._monotonic = monotonic
        self._guard = threading.Lock()
        self._session: _Session | None = None

    def keep(self, wish: Wish) -> None:
        """Go on as `wish` says, until another one is given or its time is over; returns at once."""
        with self._guard:
            session = self._session
            if session is None or session.wish.rollout != wish.rollout:
                schedule = Schedule(len(wish.prompts), wish.rollout, wish.cursor)
                if session is not None:
                    session.until = -inf
                session = self._session = _Session(wish, schedule, -inf)
            session.wish = wish
            session.until = self._monotonic() + wish.send_s
            if wish.send_s > 0 and session.thread is None:
                session.thread = threading.Thread(
                    target=self._run, args=(session,), name="probes", daemon=True
                )
                session.thread.start()

    def stop(self) -> None:
        """Send nothing more until the next wish; returns at once."""
        with self._guard:
            if self._session is not None:
                self._session.until = -inf

    def read(self, rollout: str) -> ProbeReading | None:
        """Return the counters of now; None if nobody ever wished for probes of that rollout."""
        with self._guard:
            session = self._session
            if session is None or session.wish.rollout != rollout:
                return None
            return ProbeReading(
                epoch=session.epoch,
                cursor=session.schedule.cursor,
                pods=session.tally.counters(),
            )

    def slowest_s(self, rollout: str) -> float:
        """Return how long the slowest of the newest rounds took; 0 if there was none."""
        with self._guard:
            session = self._session
            if session is None or session.wish.rollout != rollout:
                return 0.0
            return max(session.durations, default=0.0)

    def _run(self, session: _Session) -> None:
        try:
            asyncio.run(self._send(session))
        except Exception:
            # Whatever it is: without probes there is less evidence, and the rollout holds. What
            # was under way will never end, so this session's counters are of no use any more.
            log.exception("Probes have stopped; they begin anew with the next window.")
            with self._guard:
                if self._session is session:
                    self._session = None
        finally:
            with self._guard:
                session.thread = None

    async def _send(self, session: _Session) -> None:
        """Send rounds until the window closes, and wait for the last of them."""
        under_way: set[asyncio.Task[None]] = set()
        async with (
            httpx.AsyncClient(trust_env=False, timeout=None, limits=_LIMITS) as client,
            asyncio.TaskGroup() as rounds,
        ):
            due = self._monotonic()
            while (now := self._monotonic()) < session.until:
                wish = session.wish
                if now >= due:
                    # A machine that was asleep must not make up for what it has missed.
                    due = max(due + 1 / wish.rounds_per_s, now)
                    if len(under_way) < wish.plan.settings.max_in_flight:
                        task = rounds.create_task(self._round(client, session, wish))
                        under_way.add(task)
                        task.add_done_callback(under_way.discard)
                await asyncio.sleep(max(0.0, min(due, session.until) - self._monotonic()))

    async def _round(self, client: httpx.AsyncClient, session: _Session, wish: Wish) -> None:
        """Send one prompt to both releases at the same moment, and count what comes of it."""
        servers = {server.name: server for server in (*wish.stable, *wish.candidate)}
        releases = {name: server.release_id for name, server in servers.items()}
        with self._guard:
            one = session.schedule.next(
                [server.name for server in wish.stable],
                [server.name for server in wish.candidate],
            )
            session.tally.sent(one, releases)
        prompt = wish.prompts[one.prompt]
        began = self._monotonic()

        async def answer(name: str) -> Answer | None:
            return await ask(
                client,
                servers[name].url,
                wish.model,
                prompt.text,
                wish.plan.settings,
                salt=secrets.token_hex(16),
                monotonic=self._monotonic,
            )

        names = (*one.stable, *one.candidate)
        found = dict(zip(names, await asyncio.gather(*map(answer, names)), strict=True))
        with self._guard:
            session.durations.append(self._monotonic() - began)
            session.tally.ended(
                one,
                {name: found[name] for name in one.stable},
                {name: found[name] for name in one.candidate},
                _verdict(one, wish, prompt, found),
            )


def _verdict(
    one: Round, wish: Wish, prompt: Prompt, found: Mapping[str, Answer | None]
) -> tuple[bool, bool] | None:
    stable, candidate = found[one.stable[0]], found[one.candidate[0]]
    if not one.scored or stable is None or candidate is None:
        return None
    return compare(
        prompt,
        stable,
        candidate,
        comparing=wish.plan.comparing,
        scoring=wish.plan.settings.scoring,
    )
