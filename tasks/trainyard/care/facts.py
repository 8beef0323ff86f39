"""What the documents of a store say about who needs what: plain values for `decide`.

Objects are named by their prefix, as in `trainyard.store.objects`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from trainyard.documents.artifacts import CheckpointManifest
from trainyard.documents.channel import Channel
from trainyard.documents.plan import Plan
from trainyard.documents.release import Attestation, Release
from trainyard.releases import release_id_of
from trainyard.store.collection import COLLECTING
from trainyard.store.layout import (
    bundle_prefix,
    channel_key,
    evals_prefix,
    measurement_key,
    plan_key,
    reference_prefix,
    release_key,
    rollout_prefix,
    samples_prefix,
)
from trainyard.store.locks import StepLock
from trainyard.store.objects import StoredObject, place_of

PLAN_FOLDERS = ("verdicts", "reports", "status")
"""Folders that hold a folder for each plan."""


@dataclass(frozen=True)
class TrackFacts:
    """A release in a role of a channel."""

    release: str
    """Its key."""
    role: str
    """Such as `stable`, for people."""
    rank: int = 0
    """0 for what serves or may serve now; 1, 2, … for earlier stable releases, newest first."""
    warm_until: datetime | None = None


@dataclass(frozen=True)
class ChannelFacts:
    """What a channel needs."""

    key: str
    tracks: tuple[TrackFacts, ...]
    rollouts: frozenset[str] = frozenset()
    """Rollouts whose evidence it points to."""
    verified: frozenset[str] = frozenset()
    """Releases that must exist; adopted ones were never published here."""

    @property
    def title(self) -> str:
        """What people call it."""
        model, environment = self.key.removesuffix(".json").split("/")[1:]
        return f"channel {environment} of {model}"


@dataclass(frozen=True)
class NamingFacts:
    """A release or a plan, and what it names."""

    key: str
    names: frozenset[str]
    """Objects that it needs."""

    @property
    def title(self) -> str:
        """What people call it."""
        kind, _, rest = self.key.removesuffix(".json").partition("/")
        return f"{kind.removesuffix('s')} {rest.rpartition('/')[2]}"


@dataclass(frozen=True)
class Facts:
    """Everything that decides about what is kept."""

    objects: Mapping[str, StoredObject]
    channels: tuple[ChannelFacts, ...] = ()
    releases: tuple[NamingFacts, ...] = ()
    plans: tuple[NamingFacts, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)
    """Objects that somebody works on now, with who."""
    locked: frozenset[str] = frozenset()
    """Keys of locks that are held now, by whomever."""
    evidence: frozenset[str] = frozenset()
    """Rollouts that attestations point to."""


def channel_facts(channel: Channel) -> ChannelFacts:
    """Return what a channel needs."""
    model, rollout = channel.model, channel.rollout
    roles = [("stable", channel.stable), ("candidate", channel.candidate)]
    tracks = [
        TrackFacts(release_key(model, track.release_id), role)
        for role, track in roles
        if track is not None
    ]
    if rollout is not None and channel.in_progress:
        ids = [each for each in (rollout.release_id, rollout.reference_id) if each]
        tracks += [TrackFacts(release_key(model, each), "rollout under way") for each in ids]
    tracks += [
        TrackFacts(release_key(model, track.release_id), "earlier stable", rank, track.warm_until)
        for rank, track in enumerate(channel.previous, start=1)
    ]
    adopted = {
        track.release_id
        for track in (channel.stable, channel.candidate, *channel.previous)
        if track is not None and not track.verified
    }
    rollouts = {each.evidence_key for each in channel.rejected}
    if rollout is not None:
        rollouts |= {
            f"{rollout_prefix(model, channel.environment, rollout.number)}/looks",
            rollout.evidence_key,
        }
    return ChannelFacts(
        key=channel_key(model, channel.environment),
        tracks=tuple(tracks),
        rollouts=frozenset(_rollouts(rollouts)),
        verified=frozenset(
            track.release
            for track in tracks
            if track.release not in {release_key(model, each) for each in adopted}
        ),
    )


def release_facts(
    release: Release, attestations: Iterable[Attestation], plans: Mapping[str, Plan]
) -> NamingFacts:
    """Return what a release needs to be served, judged and understood.

    Args:
        release: the release.
        attestations: what was found out about it.
        plans: all plans by key.
    """
    inputs = set(release.provenance.inputs)
    judged_by = {
        str(each.subject["plan_id"])
        for each in attestations
        if each.kind == "verdict" and "plan_id" in each.subject
    }
    judged_by |= {
        key.removeprefix("plans/").removesuffix(".json")
        for key in inputs
        if key.startswith("plans/")
    }
    names = {
        place_of(release.checkpoint_key).prefix,
        bundle_prefix(release.compile_key),
        measurement_key(release.measurement_id),
        samples_prefix(release.measurement_id),
        reference_prefix(release.checkpoint_digest),
        *(place_of(key).prefix for key in inputs),
    }
    for plan_id in judged_by:
        names |= {f"verdicts/{plan_id}", f"reports/{plan_id}"}
    for key in inputs & plans.keys():
        names |= _assets(plans[key])
    return NamingFacts(release_key(release.model, release.release_id), frozenset(names))


def plan_facts(plan: Plan, checkpoints: Mapping[str, CheckpointManifest]) -> NamingFacts:
    """Return everything that the steps of a plan read, make or find.

    Args:
        plan: the plan.
        checkpoints: the stored manifests by key.
    """
    names = {place_of(plan.checkpoint_key).prefix, *_assets(plan)}
    names |= {f"{folder}/{plan.plan_id}" for folder in PLAN_FOLDERS}
    names |= {place_of(step.key).prefix for step in plan.steps}
    checkpoint = checkpoints.get(plan.checkpoint_key)
    if checkpoint is not None:
        names.add(reference_prefix(checkpoint.digest))
    for target in plan.targets:
        names.add(bundle_prefix(target.compile_key))
        for measured in (target.measurement_id, *target.baselines.values()):
            names |= {measurement_key(measured), samples_prefix(measured)}
        if checkpoint is not None:
            release_id = release_id_of(
                plan.spec.model,
                checkpoint_digest=checkpoint.digest,
                compile_key=target.compile_key,
                serving_digest=target.serving_digest,
            )
            names.add(release_key(plan.spec.model, release_id))
    return NamingFacts(plan_key(plan.plan_id), frozenset(names))


def lock_facts(
    locks: Mapping[str, StepLock], now: datetime
) -> tuple[dict[str, str], frozenset[str]]:
    """Return which objects somebody works on now, and which locks are held at all.

    Args:
        locks: by key.
        now: in UTC.
    """
    held: dict[str, str] = {}
    locked = set()
    for key, lock in locks.items():
        if lock.holder is None or lock.is_free(now):
            continue
        locked.add(key)
        if lock.holder.work != COLLECTING:
            held[place_of(lock.step_key).prefix] = lock.holder.work
    return held, frozenset(locked)


def evidence_of(attestations: Iterable[Attestation]) -> frozenset[str]:
    """Return the rollouts that attestations point to."""
    keys = {str(each.subject.get("evidence") or "") for each in attestations}
    return frozenset(_rollouts(keys))


def _assets(plan: Plan) -> set[str]:
    return {evals_prefix(plan.assets.digest)} if plan.assets else set()


def _rollouts(keys: Iterable[str]) -> Iterator[str]:
    """Yield the rollouts that these keys lie in."""
    for key in keys:
        place = place_of(key)
        if place.kind == "rollout":
            yield place.prefix
