"""What is kept and what can go, and why: a function of values.

Everything is kept that somebody needs (a mark), that was written lately, whose age or meaning is
not known, and all that is kept for audits. What is left can go.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from trainyard.care.facts import PLAN_FOLDERS, ChannelFacts, Facts, TrackFacts
from trainyard.store.objects import Kind, Place, StoredObject, place_of
from trainyard.store.protocol import Entry, Internal

ALWAYS_KEPT: Mapping[Kind, str] = {
    "channel": "Channels are never collected.",
    "attestations": "What was found out about a release is kept, also when the release is gone.",
    "refresh": "What refreshes have asked for is kept: no revision is asked for twice.",
    "archive": "Archived channels are kept for audits.",
    "toolchain": "What was recorded of an image is kept: plans ask for it.",
    "proof": "Transcripts of devices are kept: releases rest on them.",
    "unknown": "Nobody knows what this is, so it is left alone.",
}

ORDER: tuple[Kind, ...] = (
    # What names others goes before what it names.
    "release",
    "plan",
    "verdicts",
    "reports",
    "measurement",
    "samples",
    "references",
    "checkpoint",
    "bundle",
    "evals",
    "status",
    "rollout",
    "lock",
)
"""The order in which kinds are deleted."""


@dataclass(frozen=True)
class Policy:
    """How long things are kept that nobody needs any more. Times in seconds."""

    grace_s: float
    """Nothing goes of which any part is younger."""
    keep_releases_s: float
    """Releases younger than this are kept with all they name, whether a channel has them or not."""
    keep_plans_s: float
    """So long after its last sign of life a plan protects all that its steps read or make."""
    keep_rollouts_s: float
    """The log of a rollout is kept for so long at least."""
    keep_previous: int
    """Earlier stable releases of a channel that are kept for a rollback."""

    def least_age_s(self, kind: Kind) -> float:
        """Return the age in seconds below which an object of `kind` is kept in any case."""
        own = {
            "release": self.keep_releases_s,
            "plan": self.keep_plans_s,
            "rollout": self.keep_rollouts_s,
            **dict.fromkeys(PLAN_FOLDERS, self.keep_plans_s),
        }
        return max(self.grace_s, own.get(kind, 0.0))


@dataclass(frozen=True)
class Decision:
    """What becomes of an object."""

    object: StoredObject
    keep: bool
    reason: str
    """One sentence."""


def decide(
    facts: Facts, now: datetime, policy: Policy, *, going: Container[str] | None = None
) -> tuple[Decision, ...]:
    """Return what becomes of every object, sorted by name.

    Args:
        facts: what is stored, and who needs it.
        now: the time, in UTC.
        policy: how long things are kept.
        going: the objects that can still go; whatever else there is (a release that was stored a
            moment ago, however short they are kept) stays, with what it names. None: all can.
    """
    needed = marks(facts, now, policy, going=going)
    return tuple(
        _decide(facts, facts.objects[prefix], needed.get(prefix, ""), now, policy)
        for prefix in sorted(facts.objects)
    )


def decide_internals(
    internals: Iterable[Internal], facts: Facts, now: datetime, policy: Policy
) -> tuple[Decision, ...]:
    """Return what becomes of what the store keeps for itself, sorted by name; as `decide`."""
    found = sorted(internals, key=lambda each: each.name)
    return tuple(_decide_internal(each, facts, now, policy) for each in found)


def marks(
    facts: Facts, now: datetime, policy: Policy, *, going: Container[str] | None = None
) -> dict[str, str]:
    """Return every object that somebody needs, with the first reason; some may not exist."""
    found: dict[str, str] = {}
    for prefix, reason in _roots(facts, now, policy):
        found.setdefault(prefix, reason)
    for release in facts.releases:
        stored = facts.objects.get(release.key)
        recent = stored is not None and _is_young(stored, now, policy)
        stays = going is not None and release.key not in going
        # A release that stays, for whatever reason, keeps what it names.
        if release.key in found or recent or stays:
            for name in sorted(release.names):
                found.setdefault(name, f"The {release.title} names it.")
    return found


def kept_tracks(channel: ChannelFacts, now: datetime, policy: Policy) -> Iterator[TrackFacts]:
    """Yield the tracks of a channel whose releases are kept."""
    for track in channel.tracks:
        warm = track.warm_until is not None and track.warm_until > now
        if track.rank <= policy.keep_previous or warm:
            yield track


def deletion_order(decisions: tuple[Decision, ...]) -> list[StoredObject]:
    """Return what goes, in the order in which it must go."""
    doomed = [each.object for each in decisions if not each.keep]
    return sorted(doomed, key=lambda each: (ORDER.index(each.kind), each.prefix))


def _roots(facts: Facts, now: datetime, policy: Policy) -> Iterator[tuple[str, str]]:
    for channel in facts.channels:
        for track in kept_tracks(channel, now, policy):
            yield track.release, f"It is {track.role} in {channel.title}."
        for prefix in sorted(channel.rollouts):
            yield prefix, f"The {channel.title} points to it."
    for prefix, work in sorted(facts.held.items()):
        yield prefix, f"Somebody works on it: {work}."
    for prefix in sorted(facts.evidence):
        yield prefix, "An attestation points to it."
    yield from _newest_rollouts(facts)
    for plan in facts.plans:
        if _is_active(facts, plan.key, now, policy):
            yield plan.key, "The plan was active lately."
            for name in sorted(plan.names):
                yield name, f"The {plan.title} names it and was active lately."


def _newest_rollouts(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield the last rollout of each channel: the numbers of later ones follow from it."""
    newest: dict[str, int] = {}
    for each in facts.objects.values():
        if each.kind == "rollout":
            channel, _, number = each.prefix.rpartition("/")
            newest[channel] = max(newest.get(channel, 0), int(number))
    for channel, last in sorted(newest.items()):
        yield f"{channel}/{last}", "It is the last rollout of its channel."


def _is_active(facts: Facts, plan: str, now: datetime, policy: Policy) -> bool:
    """Tell whether a plan or anything that its steps write is young."""
    plan_id = plan.removeprefix("plans/").removesuffix(".json")
    signs = [plan, *(f"{folder}/{plan_id}" for folder in PLAN_FOLDERS)]
    return any(
        _is_young(facts.objects[sign], now, policy) for sign in signs if sign in facts.objects
    )


def _is_young(stored: StoredObject, now: datetime, policy: Policy) -> bool:
    """Tell whether an object is kept for its age; one whose age is not known counts as young."""
    least = timedelta(seconds=policy.least_age_s(stored.kind))
    return stored.modified_at is None or now - stored.modified_at < least


def _decide(
    facts: Facts, stored: StoredObject, mark: str, now: datetime, policy: Policy
) -> Decision:
    if stored.kind in ALWAYS_KEPT:
        return Decision(stored, True, ALWAYS_KEPT[stored.kind])
    if mark:
        return Decision(stored, True, mark)
    if stored.prefix in facts.locked:
        return Decision(stored, True, "The lock is held.")
    return _decide_by_age(stored, now, policy)


def _decide_internal(internal: Internal, facts: Facts, now: datetime, policy: Policy) -> Decision:
    owner = place_of(internal.key)
    stored = StoredObject(
        Place("internal", internal.name, owner.model),
        (Entry(key=internal.name, size=internal.size, modified_at=internal.modified_at),),
    )
    if internal.needed:
        return Decision(stored, True, "The store itself uses it.")
    if internal.key and owner.kind == "unknown":
        return Decision(stored, True, "Nobody knows what it belongs to, so it is left alone.")
    if owner.prefix in facts.held:
        return Decision(stored, True, f"Somebody works on it: {facts.held[owner.prefix]}.")
    return _decide_by_age(stored, now, policy)


def _decide_by_age(stored: StoredObject, now: datetime, policy: Policy) -> Decision:
    """Decide about something that nobody needs."""
    if stored.modified_at is None:
        return Decision(stored, True, "The store cannot tell how old it is.")
    age = age_text(now - stored.modified_at)
    if _is_young(stored, now, policy):
        least = age_text(timedelta(seconds=policy.least_age_s(stored.kind)))
        return Decision(stored, True, f"It was written {age} ago; it is kept for {least} at least.")
    return Decision(stored, False, f"{_why_not(stored)} It was written {age} ago.")


def _why_not(stored: StoredObject) -> str:
    if not stored.complete:
        return "It has no manifest: a step was cut, and nobody goes on with it."
    if stored.kind == "lock":
        return "The lock is free."
    if stored.kind == "internal":
        return "It was left by something that was cut, or is about a key that is gone."
    return "No channel, recent release or active plan needs it."


def age_text(age: timedelta) -> str:
    """Return an age for people, such as `3.5 days` or `20 s`."""
    seconds = age.total_seconds()
    for unit, length_s in (("days", 86400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= length_s:
            return f"{seconds / length_s:.3g} {unit}"
    return f"{seconds:.3g} s"
