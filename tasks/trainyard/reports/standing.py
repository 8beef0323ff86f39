"""Where channels stand, for people at a terminal and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table

from trainyard.documents.base import Frozen
from trainyard.documents.channel import Channel, HistoryEntry, Rollout
from trainyard.documents.evidence import MetricVerdict
from trainyard.reports.glance import glance

SHOWN_EVENTS = 10

LeaseWord = Literal["alive", "expired", "absent", "unknown"]


class ServerLine(Frozen):
    """One server as its host sees it."""

    name: str
    release_id: str
    state: str
    message: str = ""


class RouteLine(Frozen):
    """The route as it is in effect."""

    weights: Mapping[str, int]
    """Percent by release id."""
    guard: str
    guard_reason: str = ""


class PauseLine(Frozen):
    """A pause that goes on."""

    since: datetime
    who: str
    reason: str
    left_s: float
    """Seconds until the release is withdrawn."""


class WaitingLine(Frozen):
    """A request that waits for its turn."""

    release_id: str
    run_id: str
    since: datetime
    requested_by: str = ""


class LimitLine(Frozen):
    """A limit that ends a phase, and what is left of it."""

    name: str
    of_s: float
    left_s: float


class Standing(Frozen):
    """Where one channel stands."""

    at: datetime
    model: str
    environment: str
    generation: int
    state: str
    """In words, such as `holding, step 1 of 2`."""
    in_progress: bool
    since: datetime | None
    stable: str
    """Release id; empty: none."""
    candidate: str
    weights: Mapping[str, int]
    """Percent by track, as wished for."""
    rollout: int | None = None
    kind: str = ""
    outcome: str = ""
    requested_by: str = ""
    reason: str = ""
    """What it waits for, or why it ended."""
    driver: str = ""
    """Run that drives the rollout under way."""
    lease: LeaseWord = "unknown"
    """`alive`: somebody drives it."""
    paused: PauseLine | None = None
    limits: tuple[LimitLine, ...] = ()
    verdict: str = ""
    """Of the last look: HARM, NON_INFERIOR or UNDECIDED."""
    verdict_reason: str = ""
    exposed_requests: int = 0
    beyond: tuple[str, ...] = ()
    """Ways in which live traffic was beyond what the release was measured with, with figures."""
    metrics: tuple[MetricVerdict, ...] = ()
    waiting: tuple[WaitingLine, ...] = ()
    route: RouteLine | None = None
    """None: the router cannot be asked."""
    servers: tuple[ServerLine, ...] | None = None
    """None: the host cannot be asked."""
    can: tuple[str, ...] = ()
    """Commands of `trainyard` that can be given now."""


def standing_of(channel: Channel, now: datetime) -> Standing:
    """Return what the channel alone tells."""
    said = glance(channel)
    rollout = channel.rollout
    standing = Standing(
        at=now,
        model=channel.model,
        environment=channel.environment,
        generation=channel.generation,
        state=said.state,
        in_progress=channel.in_progress,
        since=said.since,
        stable=said.stable,
        candidate=said.candidate,
        weights={"stable": channel.weights.stable, "candidate": channel.weights.candidate},
        waiting=tuple(
            WaitingLine(
                release_id=each.release_id,
                run_id=each.run_id,
                since=each.since,
                requested_by=each.requested_by,
            )
            for each in channel.waiting
        ),
    )
    if rollout is None:
        return standing
    verdict = rollout.verdict
    return standing.model_copy(
        update={
            "rollout": rollout.number,
            "kind": rollout.plan.kind,
            "outcome": rollout.outcome or "",
            "requested_by": rollout.requested_by,
            "reason": rollout.reason,
            "driver": rollout.driver.run_id if channel.in_progress else "",
            "paused": _pause(rollout, now),
            "limits": tuple(_limits(rollout, now)) if channel.in_progress else (),
            "verdict": verdict.outcome if verdict is not None else "",
            "verdict_reason": verdict.reason if verdict is not None else "",
            "beyond": tuple(each.why for each in rollout.beyond),
            "exposed_requests": verdict.exposed_requests if verdict is not None else 0,
            "metrics": verdict.metrics if verdict is not None else (),
        }
    )


def _pause(rollout: Rollout, now: datetime) -> PauseLine | None:
    pause = rollout.paused
    if pause is None:
        return None
    left_s = rollout.plan.max_pause_s - rollout.paused_s(now)
    return PauseLine(since=pause.since, who=pause.who, reason=pause.reason, left_s=left_s)


def _limits(rollout: Rollout, now: datetime) -> Iterable[LimitLine]:
    """Yield what ends the present phase by time alone."""
    plan = rollout.plan
    if rollout.ending is not None or rollout.outcome is not None:
        return
    if rollout.phase == "baking":
        past_s = (now - rollout.phase_since).total_seconds()
        yield LimitLine(name="bake", of_s=plan.bake_s, left_s=max(0.0, plan.bake_s - past_s))
    elif rollout.held_since is not None:
        past_s = rollout.running_s(rollout.held_since, now)
        yield LimitLine(name="hold", of_s=plan.max_hold_s, left_s=plan.max_hold_s - past_s)
    elif rollout.exposed_since is not None:
        past_s = rollout.running_s(rollout.exposed_since, now)
        yield LimitLine(
            name="exposure", of_s=plan.max_duration_s, left_s=plan.max_duration_s - past_s
        )
    else:
        past_s = rollout.running_s(rollout.started_at, now)
        yield LimitLine(
            name="deploy", of_s=plan.deploy_timeout_s, left_s=plan.deploy_timeout_s - past_s
        )


def standings_table(
    standings: Iterable[Standing], unreadable: Iterable[str] = ()
) -> RenderableType:
    """Return one row a channel, and a line for each whose route does not do what it wishes.

    Args:
        standings: of the channels.
        unreadable: keys of channels that cannot be read, which have a row as well.
    """
    table = Table(
        *("Model", "Environment", "Rollout", "State", "Stable", "Candidate", "Route", "Driver"),
        box=None,
        pad_edge=False,
    )
    lines: list[str] = []
    for one in standings:
        trouble = route_trouble(one)
        if trouble:
            lines.append(f"{one.model} in {one.environment}: {trouble}")
        table.add_row(
            one.model,
            one.environment,
            "" if one.rollout is None else str(one.rollout),
            one.state,
            _with_share(one, one.stable, "stable") if trouble else one.stable,
            _with_share(one, one.candidate, "candidate"),
            _route_word(one, trouble),
            _driver(one) if one.in_progress else "",
        )
    for key in unreadable:
        model, environment = key.removesuffix(".json").split("/")[1:]
        table.add_row(model, environment, "", "cannot be read")
    return Group(table, *(["", *lines] if lines else []))


def route_trouble(one: Standing) -> str:
    """Return what the route does in place of what the channel wishes, in sentences.

    Empty if it does that, or if nobody can tell.
    """
    if one.route is None:
        return ""
    wished = {
        release_id: one.weights[track]
        for track, release_id in (("stable", one.stable), ("candidate", one.candidate))
        if release_id and one.weights[track]
    }
    effective = {release_id: share for release_id, share in one.route.weights.items() if share}
    follows = one.route.guard == "following"
    if follows and effective == wished:
        return ""
    told = f"The route does not follow the channel: {_shares(effective)}."
    if follows:
        return f"{told} It may not have come to that yet."
    return f"{told} The guard, {one.route.guard.replace('_', ' ')}: {one.route.guard_reason}"


def _shares(weights: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {share} %" for name, share in weights.items()) or "no traffic"


def _route_word(one: Standing, trouble: str) -> str:
    if one.route is None:
        return "cannot be asked" if one.stable or one.candidate else ""
    if not trouble:
        return "as wished"
    guard = one.route.guard
    return f"NOT as wished: {'not yet' if guard == 'following' else guard.replace('_', ' ')}"


def _with_share(one: Standing, release_id: str, track: str) -> str:
    """Return a release with its share of the traffic: as it is, and as wished if that differs."""
    if not release_id:
        return ""
    wished = one.weights[track]
    if one.route is None:
        return f"{release_id} ({wished} % wished)"
    share = one.route.weights.get(release_id, 0)
    also = "" if share == wished else f", {wished} % wished"
    return f"{release_id} ({share} %{also})"


def _driver(one: Standing) -> str:
    words = {"alive": "alive", "unknown": "cannot be asked"}
    return words.get(one.lease, "nobody drives it")


def standing_detail(one: Standing, history: Iterable[HistoryEntry]) -> RenderableType:
    """Return everything about one channel."""
    parts: list[RenderableType] = [_facts(one)]
    if one.metrics:
        parts += ["", _metrics(one)]
    if one.servers:
        parts += ["", _servers(one)]
    events = Table("When", "Rollout", "Event", "Release", "Who", "Detail", box=None, pad_edge=False)
    for entry in list(history)[-SHOWN_EVENTS:]:
        detail = ", ".join(f"{key} {value}" for key, value in entry.detail.items())
        when = f"{entry.at:%Y-%m-%d %H:%M:%S}"
        number = "" if entry.rollout is None else str(entry.rollout)
        events.add_row(when, number, entry.event, entry.release_id, entry.who, detail)
    parts += ["", events]
    if one.can:
        parts += ["", f"You can: {', '.join(one.can)}."]
    return Group(*parts)


def _facts(one: Standing) -> Table:
    table = Table.grid(padding=(0, 2))
    rows = [
        ("Channel", f"{one.model} in {one.environment}"),
        ("State", one.state),
        *([("Rollout", f"{one.rollout} ({one.kind})")] if one.rollout is not None else []),
        ("Stable", f"{one.stable or 'none'} ({one.weights['stable']} % wished)"),
    ]
    if one.candidate:
        rows.append(("Candidate", f"{one.candidate} ({one.weights['candidate']} % wished)"))
    rows += _route_rows(one)
    if one.in_progress:
        rows.append(("Driver", f"{one.driver}: {_driver(one)}"))
    if one.paused is not None:
        who = one.paused.who or "somebody"
        rows.append(("Paused", f"by {who}, {_left(one.paused.left_s)}: {one.paused.reason}"))
    rows += [(limit.name.capitalize(), f"{_left(limit.left_s)}") for limit in one.limits]
    rows += [("Waits", f"{each.release_id}, since {each.since:%H:%M:%S}") for each in one.waiting]
    if one.verdict:
        rows.append(("Judge", f"{one.verdict}: {one.verdict_reason}"))
    rows += [("Not measured", why) for why in one.beyond]
    if one.reason and one.reason != one.verdict_reason:
        rows.append(("Why", one.reason))
    if one.servers is None:
        rows.append(("Servers", "the host cannot be asked"))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _route_rows(one: Standing) -> list[tuple[str, str]]:
    if one.route is None:
        return [("Route", "the router cannot be asked")]
    rows = [("Route", _shares(one.route.weights))]
    if one.route.guard != "following":
        guard = one.route.guard.replace("_", " ")
        rows.append(("Guard", f"{guard}: {one.route.guard_reason}"))
    elif route_trouble(one):
        rows.append(("", "It does not follow the channel yet."))
    return rows


def _left(seconds: float) -> str:
    return f"{max(0.0, seconds):.0f} s left"


def _metrics(one: Standing) -> Table:
    table = Table("Metric", "Stable", "Candidate", "Verdict", "Harm", "Promote", box=None)
    for metric in one.metrics:
        table.add_row(
            metric.metric,
            _figure(metric.stable_value),
            _figure(metric.candidate_value),
            metric.standing,
            f"{metric.harm_evidence:.1f} of {metric.harm_threshold:.1f}",
            "-"
            if metric.harm_only
            else f"{metric.promote_evidence:.1f} of {metric.promote_threshold:.1f}",
        )
    return table


def _figure(value: float | None) -> str:
    return "no data" if value is None else f"{value:.4g}"


def _servers(one: Standing) -> Table:
    table = Table("Server", "State", "Message", box=None, pad_edge=False)
    for server in one.servers or ():
        table.add_row(server.name, server.state, server.message)
    return table
