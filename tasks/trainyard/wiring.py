"""Puts the parts together: rollouts with this installation's store, servers, route and judge.

Whoever starts a rollout (the trigger in Airflow, the tests) gets it from here. All calls block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from trainyard.documents.base import Provenance
from trainyard.documents.channel import Channel, RolloutDriver
from trainyard.errors import BadInput, StaleDriver
from trainyard.releases import load_release
from trainyard.rollout.channel_store import read_channel
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.driver import (
    DriveResult,
    Settled,
    drive,
    ending_of,
    plan_for,
    request_rollback,
    settle,
    start_rollout,
    summary_of,
)
from trainyard.rollout.judge import judge
from trainyard.rollout.metrics import HttpMetricReader
from trainyard.rollout.plan_rollout import NothingToDo
from trainyard.rollout.warm_up import HttpWarmer
from trainyard.serving.guard_events import guard_events
from trainyard.serving.lease import FileLease
from trainyard.serving.local_host import LocalHost
from trainyard.serving.local_router import LocalRouter
from trainyard.settings import Settings
from trainyard.spec.environments import Environment
from trainyard.spec.loader import load_environments
from trainyard.store.factory import open_store

Kind = Literal["promote", "rollback"]
Tick = Callable[[], DriveResult]

WATCH_EVERY_S = 2.0


def open_rollout(settings: Settings, tell: Callable[[str], None] | None = None) -> Rollouts:
    """Return the rollouts of this installation.

    Args:
        settings: of this installation.
        tell: takes each event as a line for people.

    Raises:
        BadInput: store or environments file cannot be used.
    """
    store = open_store(settings)
    environments = load_environments(settings.environments).environments
    return Rollouts(
        RolloutDeps(
            store=store,
            host=LocalHost(settings),
            router=LocalRouter(settings),
            lease=FileLease(settings),
            metrics=HttpMetricReader(),
            warmer=HttpWarmer(store),
            judge=judge,
            load_release=lambda model, release_id: load_release(store, model, release_id, settings),
            guard_events=partial(guard_events, store),
            environments=_local_only(environments),
            drain_timeout_s=settings.drain_timeout_s,
            tell=tell or (lambda line: None),
            provenance=Provenance.of(settings),
        )
    )


def _local_only(environments: dict[str, Environment]) -> dict[str, Environment]:
    """Return the environments this version can roll out to."""
    return {name: env for name, env in environments.items() if env.platform == "local"}


@dataclass(frozen=True)
class Rollouts:
    """What can be done with the channels of this installation."""

    deps: RolloutDeps

    def check(
        self, *, model: str, environment: str, release_id: str, force: bool, reason: str
    ) -> str:
        """Refuse a promotion that would be refused, without touching anything.

        Returns:
            One sentence about what the promotion will do.

        Raises:
            BadInput, NotFound, Refused, Busy: as `trainyard.rollout.plan_rollout.plan_rollout`.
        """
        channel = read_channel(self.deps.store, model, environment)
        release, plan = plan_for(self.deps, channel, release_id, force=force, reason=reason)
        if isinstance(plan, NothingToDo):
            return plan.message
        steps = ", ".join(f"{step.weight} % for {step.hold_s:g} s" for step in plan.steps)
        how = "as the first stable release" if plan.kind == "bootstrap" else f"in steps: {steps}"
        return f"{release.release_id} (revision {release.revision}) goes to {environment} {how}."

    def begin(
        self,
        *,
        kind: Kind,
        model: str,
        environment: str,
        release_id: str | None,
        force: bool,
        reason: str,
        requested_by: str,
        run_id: str,
    ) -> Tick:
        """Take the channel for a run, or go on with what it has, and return what makes one tick.

        Raises:
            BadInput, NotFound, Refused, Busy, Conflict: it cannot be begun.
        """
        if kind == "rollback":
            channel = request_rollback(
                self.deps,
                model,
                environment,
                run_id=run_id,
                release_id=release_id,
                reason=reason,
                requested_by=requested_by,
            )
        elif release_id is None:
            raise BadInput("A promotion needs a release.")
        else:
            channel = start_rollout(
                self.deps,
                model,
                environment,
                release_id,
                run_id=run_id,
                force=force,
                reason=reason,
                requested_by=requested_by,
            )
        return self._ticks(channel, run_id)

    def _ticks(self, channel: Channel, run_id: str) -> Tick:
        rollout = channel.rollout
        if rollout is None or rollout.driver.run_id != run_id:
            return lambda: _nothing_to_do(channel)
        return _Driving(
            self.deps, channel.model, channel.environment, rollout.number, rollout.driver
        )

    def settle(
        self, *, model: str, environment: str, release_id: str | None, run_id: str
    ) -> Settled:
        """End what a run has left unfinished, and tell how its rollout ended. Idempotent."""
        return settle(self.deps, model, environment, run_id=run_id, release_id=release_id)


@dataclass
class _Driving:
    """Drives a rollout; once somebody else does, watches it to its end.

    A second triggerer may take a rollout over while the first one still lives, and a rollback takes
    over whatever is under way. The first one then only waits for the outcome, because a trigger
    that ends without one would count as failed.
    """

    deps: RolloutDeps
    model: str
    environment: str
    number: int
    driver: RolloutDriver
    _watching: bool = False

    def __call__(self) -> DriveResult:
        if not self._watching:
            try:
                return drive(self.deps, self.model, self.environment, self.driver)
            except StaleDriver as error:
                self._watching = True
                channel = read_channel(self.deps.store, self.model, self.environment)
                return _watched(channel, self.number, (str(error),))
        channel = read_channel(self.deps.store, self.model, self.environment)
        return _watched(channel, self.number)


def _watched(channel: Channel, number: int, messages: tuple[str, ...] = ()) -> DriveResult:
    ended = ending_of(channel, number)
    rollout = channel.rollout
    if ended is None and (rollout is None or rollout.number != number):
        ended = ("withdrawn", "The channel was reset.")
    if ended is None:
        return DriveResult(False, channel, None, summary_of(channel), messages, WATCH_EVERY_S)
    outcome, reason = ended
    return DriveResult(True, channel, outcome, reason, messages)


def _nothing_to_do(channel: Channel) -> DriveResult:
    stable = channel.stable.release_id if channel.stable else "nothing"
    summary = f"{channel.environment} serves {stable} already; nothing was to be done."
    return DriveResult(True, channel, "promoted", summary)
