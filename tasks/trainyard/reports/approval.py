"""What people read before they approve a promotion, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainyard.documents.channel import Channel
from trainyard.documents.measurement import GateVerdict
from trainyard.documents.release import Release
from trainyard.gates.words import number

_MARKS = {"pass": "✓ pass", "warn": "⚠ warn", "fail": "✗ fail", "skipped": "- skipped"}

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&])")


def approval_request(
    release: Release,
    channel: Channel,
    verdicts: Sequence[GateVerdict],
    *,
    requested_by: str,
    reason: str,
    needs: int,
    page: str,
) -> str:
    """Return the question with what is needed to answer it.

    Args:
        release: what is to come.
        channel: where it is to come.
        verdicts: of the gates that let it pass.
        requested_by: who asked for the promotion.
        reason: why.
        needs: how many people have to approve.
        page: address of the Trainyard page, without a slash at its end.
    """
    stable = channel.stable
    lines = [
        f"**{plain(release.release_id)}** is to serve **{plain(release.model)}** in "
        f"**{plain(channel.environment)}**"
        + (f" in place of {plain(stable.release_id)}." if stable else ", as its first release."),
        "",
        f"- Revision {plain(release.revision)} for target {plain(release.target.name)}, "
        f"published {release.created_at:%Y-%m-%d %H:%M} UTC",
        f"- Asked for by {plain(requested_by) or 'a schedule'}"
        + (f": {plain(reason)}" if reason else ""),
        f"- {needs} {'person has' if needs == 1 else 'people have'} to approve",
    ]
    for verdict in verdicts:
        lines += _gate(verdict)
    if not verdicts:
        lines += ["", "No verdict of a gate is on record."]
    base = f"{page}/releases/{release.model}/{release.release_id}"
    channel_page = f"{page}/channels/{channel.environment}/{release.model}"
    lines += ["", f"[Everything about the release]({base}) · [The channel]({channel_page})"]
    if stable:
        lines[-1] += f" · [What differs from stable]({base}/diff?against={stable.release_id})"
    return "\n".join(lines)


def _gate(verdict: GateVerdict) -> list[str]:
    rows = [
        f"| {plain(check.what)} | {_figure(check.observed)} | {plain(check.bound)} "
        f"| {_MARKS[check.outcome]} |"
        for check in verdict.checks
    ]
    return [
        "",
        f"**{verdict.gate.capitalize()} gate: {_MARKS[verdict.outcome]}.** "
        f"{plain(verdict.summary)}",
        "",
        "| what | observed | bound | |",
        "|---|---|---|---|",
        *rows,
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else plain(number(value))


def plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
