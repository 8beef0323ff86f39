"""What happens in a rollout, in words for people: one line an event."""

from __future__ import annotations

from typing import Any

from trainyard.documents.channel import HistoryEntry
from trainyard.documents.evidence import MetricVerdict, Verdict

_LINES = {
    "rollout_started": "rollout of {release} started ({kind})",
    "requester": "rollout of {release}",
    "driver": "{run_id} drives the rollout now",
    "deployed": "{release} is deployed (ready servers: {servers})",
    "warmed": "{server} answered {requests} warm-up requests",
    "weights": "{release} gets {weight} % of the traffic",
    "held": "undecided after {after_s:g} s: weights are frozen for at most {until_s:g} s. {why}",
    "paused": "paused at {weight} %, for at most {until_s:g} s, then it is withdrawn: {why}",
    "resumed": "goes on after a pause of {after_s:g} s. {why}",
    "promoted_by_hand": "{release} takes over by hand, without the judge's proof ({verdict}); "
    "{holdback} % stay on the old one: {why}",
    "queued": "{release} waits until the rollout under way is over (number {place} in line)",
    "unqueued": "{release} does not wait any more",
    "slo_missed": "{release} misses its objectives ({alert}): {why}",
    "slo_met": "{release}: {alert} is over",
    "blind": "looks do not see both releases ({why}): nothing goes on, for {until_s:g} s at most",
    "beyond_envelope": "live traffic is beyond what {release} was measured with: {why}",
    "sighted": "looks see both releases again",
    "stable_down": "{release} has no ready server: {alone} serves alone, and keeps its servers "
    "until that has one again",
    "stable_back": "{release} has a ready server again",
    "bake_anew": "nobody drove the bake for {away_s:g} s: it begins anew",
    "proven": "{release} is proven and takes over; {holdback} % stay on the old one. {why}",
    "holdback": "the old release has {weight} % now",
    "ending": "all traffic goes back ({outcome}): {why}",
    "unverified": "the route could not show within {waited_s:g} s that {release} has no traffic",
    "promoted": "promoted: {why}",
    "returned": "rolled back: {why}",
    "rolled_back": "rolled back and rejected: {why}",
    "adopted": "Deployment {deployment} is the stable release now, as {release}, unverified",
    "withdrawn": "withdrawn, may be tried again: {why}",
}


def describe_entry(entry: HistoryEntry) -> str:
    """Return one line about an entry of a channel's history."""
    values: dict[str, Any] = {"release": entry.release_id, "why": "", **entry.detail}
    line = _LINES.get(entry.event)
    try:
        text = line.format(**values) if line is not None else entry.event.replace("_", " ")
    except (LookupError, ValueError):
        # An entry of another version that lacks a detail is still worth its name.
        text = entry.event.replace("_", " ")
    return f"{text.strip()} (asked for by {entry.who})" if entry.who else text.strip()


def describe_look(slot: int, weight: int, verdict: Verdict) -> str:
    """Return one line about a look.

    Args:
        slot: number of the slice of time.
        weight: percent of the traffic that the release under test has.
        verdict: what the judge said.
    """
    metrics = "; ".join(_metric(one) for one in verdict.metrics if one.needs_a_word)
    outcome = verdict.outcome.replace("_", "-").lower()
    return f"look {slot} at {weight} %: {metrics}; {outcome}"


def _metric(one: MetricVerdict) -> str:
    if one.stable_value is None or one.candidate_value is None:
        return f"{one.metric} not comparable yet"
    change = f" ({one.ratio - 1:+.0%})" if one.ratio is not None else ""
    harm = (
        f"{one.metric} {_value(one, one.candidate_value)} vs {_value(one, one.stable_value)}"
        f"{change}, evidence of harm {one.harm_evidence:.1f} of {one.harm_threshold:.1f}"
    )
    if one.harm_only:
        return harm
    return f"{harm}, of quality {one.promote_evidence:.1f} of {one.promote_threshold:.1f}"


def _value(one: MetricVerdict, value: float) -> str:
    if one.metric in {"ttft", "tpot"}:
        return f"{value * 1000:.3g} ms"
    return f"{value:.2%}"
