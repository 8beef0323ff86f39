"""`trainyard status`, `rollback`, `abort`, `pause`, `resume`, `promote-now`: without Airflow.

Each reads and writes the channel in the store, as the user who runs it. Whoever may write there may
give these commands; nothing else is asked, so that they work when everything else is down.
"""

from __future__ import annotations

import getpass
import os
import platform
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainyard.console import fail, say, settings, show, show_json
from trainyard.errors import BadInput, CorruptFile, NotFound, Refused, TrainyardError
from trainyard.names import check_name, check_release_id

if TYPE_CHECKING:
    from trainyard.documents.channel import Channel
    from trainyard.rollout.rollouts import Rollouts
    from trainyard.settings import Settings

WATCH_ROLLBACK_S = 3600.0
"""Seconds that a rollback of the watch may take."""

ModelArgument = Annotated[str, typer.Argument(help="Name of the model.", show_default=False)]
EnvironmentArgument = Annotated[
    str, typer.Argument(help="Name of the environment.", show_default=False)
]
ReasonOption = Annotated[
    str,
    typer.Option("--reason", help="Why; kept in the channel's history.", show_default=False),
]
WaitOption = Annotated[
    bool,
    typer.Option(
        "--wait/--no-wait",
        help="Stay until the rollout is over. If nobody drives it, the command stays in any case.",
    ),
]
StayOption = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Stay and watch until the rollout is over.")
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds that it waits at most.")
]


def current_user(found: Settings) -> str:
    """Return who gives a command: as the settings name them, or as the system does."""
    if found.requested_by:
        return found.requested_by
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run as a user without a name.
        return f"uid {os.getuid()}"


def new_run_id(who: str) -> str:
    """Return an id for what this command drives; two commands never have the same."""
    return f"cli/{who}@{platform.node()}/{uuid.uuid4().hex[:12]}"


def _open(model: str, environment: str) -> tuple[Settings, Rollouts]:
    """Return the rollouts of this installation. Raises BadInput, NotFound, Transient."""
    from trainyard.store.factory import demand_content
    from trainyard.wiring import open_rollout

    check_name(model, "Model")
    check_name(environment, "Environment")
    found = settings()
    rollouts = open_rollout(found)
    rollouts.deps.environment(environment)
    demand_content(rollouts.deps.store)
    return found, rollouts


def _give(model: str, environment: str, command: Callable[[Settings, Rollouts], Channel]) -> None:
    """Give a command, and say where the channel stands then."""
    from trainyard.rollout.driver import summary_of

    try:
        found, rollouts = _open(model, environment)
        channel = command(found, rollouts)
    except TrainyardError as error:
        fail(error)
    except KeyboardInterrupt:
        say("Interrupted. What was wished for stays in the channel; the same command goes on.")
        raise typer.Exit(130) from None
    say(summary_of(channel))


def rollback(
    model: ModelArgument,
    environment: EnvironmentArgument,
    to: Annotated[
        str,
        typer.Option("--to", help="Release to go back to; empty: undo the last promotion."),
    ] = "",
    reason: ReasonOption = "",
    wait: WaitOption = True,
    timeout: TimeoutOption = 3600.0,
) -> None:
    """Bring all traffic back to an earlier release; ends a promotion under way first."""
    from trainyard.rollout.by_hand import roll_back

    def command(found: Settings, rollouts: Rollouts) -> Channel:
        who = current_user(found)
        return roll_back(
            rollouts.deps,
            model,
            environment,
            release_id=check_release_id(to) if to else None,
            reason=reason,
            who=who,
            run_id=new_run_id(who),
            say=say,
            timeout_s=timeout,
            wait=wait,
        )

    _give(model, environment, command)


def abort(
    model: ModelArgument,
    environment: EnvironmentArgument,
    reason: ReasonOption = "",
    wait: WaitOption = True,
    timeout: TimeoutOption = 3600.0,
) -> None:
    """Withdraw the release under way: all traffic goes back to the stable one at once."""
    from trainyard.rollout.by_hand import abort_rollout

    def command(found: Settings, rollouts: Rollouts) -> Channel:
        who = current_user(found)
        return abort_rollout(
            rollouts.deps,
            model,
            environment,
            reason=reason,
            who=who,
            run_id=new_run_id(who),
            say=say,
            timeout_s=timeout,
            wait=wait,
        )

    _give(model, environment, command)


def pause(
    model: ModelArgument,
    environment: EnvironmentArgument,
    reason: ReasonOption = "",
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait",
            help="Stay until the rollout is over, and drive it if its driver has fallen silent.",
        ),
    ] = False,
    timeout: TimeoutOption = 86400.0,
) -> None:
    """Freeze a rollout's weights where they are; the judge and all fuses go on.

    Weights stay only while a driver lives. The command says so if it sees none.
    """
    from trainyard.rollout.by_hand import DRIVER_SILENT_S, pause_and_stay

    def command(found: Settings, rollouts: Rollouts) -> Channel:
        who = current_user(found)
        if wait:
            return pause_and_stay(
                rollouts.deps,
                model,
                environment,
                reason=reason,
                who=who,
                run_id=new_run_id(who),
                say=say,
                timeout_s=timeout,
            )
        channel = rollouts.pause(model=model, environment=environment, reason=reason, who=who)
        say(f"The channel has the pause. Looking for its driver, {DRIVER_SILENT_S:g} s at most.")
        for line in rollouts.what_a_pause_holds(channel):
            say(line)
        return channel

    _give(model, environment, command)


def resume(
    model: ModelArgument,
    environment: EnvironmentArgument,
    reason: ReasonOption = "",
    wait: StayOption = False,
    timeout: TimeoutOption = 86400.0,
) -> None:
    """Let a paused rollout go on."""
    _wish(model, environment, "resume", reason, wait, timeout)


def promote_now(
    model: ModelArgument,
    environment: EnvironmentArgument,
    reason: ReasonOption = "",
    wait: StayOption = False,
    timeout: TimeoutOption = 86400.0,
) -> None:
    """Go on to the bake without the judge's proof: you answer for the release."""
    _wish(model, environment, "promote_now", reason, wait, timeout)


def _wish(
    model: str, environment: str, verb: str, reason: str, wait: bool, timeout_s: float
) -> None:
    """Write a wish into the channel; with `wait`, watch until the rollout is over."""
    from trainyard.rollout.by_hand import see_through

    def command(found: Settings, rollouts: Rollouts) -> Channel:
        who = current_user(found)
        wish = getattr(rollouts, verb)
        channel: Channel = wish(model=model, environment=environment, reason=reason, who=who)
        if not wait:
            return channel
        return see_through(
            rollouts.deps,
            model,
            environment,
            run_id=new_run_id(who),
            say=say,
            timeout_s=timeout_s,
            take_over=False,
        )

    _give(model, environment, command)


def watch() -> None:
    """Look once at every channel whose rollout is over, and roll back where its SLO demands it.

    The DAG neuron_watch does the same. Ends with 20 if there is something that people must hear of.
    """
    from trainyard.rollout.by_hand import roll_back
    from trainyard.rollout.watcher import Finding, watch_all
    from trainyard.store.factory import demand_content
    from trainyard.wiring import open_rollout

    def back(finding: Finding) -> None:
        roll_back(
            deps,
            finding.model,
            finding.environment,
            release_id=finding.release_id,
            reason=f"The watch: {finding.message}",
            who=current_user(found),
            run_id=finding.run_id,
            say=say,
            timeout_s=WATCH_ROLLBACK_S,
        )

    try:
        found = settings()
        deps = open_rollout(found).deps
        demand_content(deps.store)
        findings = watch_all(deps, back)
    except TrainyardError as error:
        fail(error)
    for one in findings:
        say(f"{one.model} in {one.environment}: {one.message}")
    news = sum(one.is_news for one in findings)
    if news:
        fail(Refused(f"{news} of these must be looked at.", hint="`trainyard status` shows more."))


def status(
    model: Annotated[
        str,
        typer.Argument(help="Name of a model; empty: all. Or the id of a plan, for its steps."),
    ] = "",
    environment: Annotated[
        str, typer.Argument(help="Name of an environment, for every detail; empty: all.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show where channels and their rollouts stand, or how far the steps of a plan are."""
    try:
        if environment:
            _show_channel(model, environment, as_json)
        elif not (model and _show_plan(model, as_json)):
            _show_channels(model, as_json)
    except TrainyardError as error:
        fail(error)


def _show_channel(model: str, environment: str, as_json: bool) -> None:
    from trainyard.reports.standing import standing_detail
    from trainyard.rollout.channel_store import read_channel
    from trainyard.rollout.standing import take_standing

    _, rollouts = _open(model, environment)
    channel = read_channel(rollouts.deps.store, model, environment)
    if not channel.generation:
        raise NotFound(
            f"{model} has no channel in {environment}: nothing was promoted there yet.",
            hint="`trainyard status` shows all channels there are.",
        )
    standing = take_standing(rollouts.deps, channel)
    if as_json:
        show_json(standing.model_dump(mode="json"))
    else:
        show(standing_detail(standing, channel.history))


def _show_channels(model: str, as_json: bool) -> None:
    from trainyard.reports.standing import standings_table
    from trainyard.rollout.channel_store import list_channels
    from trainyard.rollout.standing import take_standings
    from trainyard.store.factory import demand_content
    from trainyard.wiring import open_rollout

    deps = open_rollout(settings()).deps
    demand_content(deps.store)
    listed = list_channels(deps.store, model=model)
    channels = [channel for channel in listed.channels if channel.generation]
    if model and not channels and not listed.unreadable:
        raise NotFound(
            f"{model} has no channel, and no step of a plan of that name has begun.",
            hint="`trainyard status` shows all channels; `trainyard plan` prints ids of plans.",
        )
    found = take_standings(deps, channels, with_servers=as_json)
    if as_json:
        show_json([one.model_dump(mode="json") for one in found])
    elif found or listed.unreadable:
        show(standings_table(found, listed.unreadable))
    else:
        say("Nothing was promoted yet.")
    if listed.unreadable:
        damaged = " ".join(error.message for error in listed.unreadable.values())
        fail(CorruptFile(damaged, hint=next(iter(listed.unreadable.values())).hint))


def _show_plan(plan_id: str, as_json: bool) -> bool:
    """Show the steps of a plan; False if there is no plan of that id."""
    from trainyard.reports.status import status_table
    from trainyard.steps.status import list_statuses
    from trainyard.store.factory import open_store

    try:
        found: Sequence[Any] = list_statuses(open_store(settings()), plan_id)
    except BadInput:
        return False
    if not found:
        return False
    if as_json:
        show_json([one.model_dump(mode="json", by_alias=True) for one in found])
    else:
        show(status_table(found))
    return True
