"""What lies in a store, as things that live and die together instead of single keys.

A checkpoint is all keys below its prefix, a release is one key. Nothing is read here: the shape of
a key says what it belongs to, and a key whose shape is not known belongs to nobody but itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from trainyard.errors import BadInput
from trainyard.store.layout import (
    MANIFEST_NAME,
    attestation_prefix,
    bundle_prefix,
    channel_key,
    checkpoint_prefix,
    evals_prefix,
    measurement_key,
    plan_key,
    proof_key,
    reference_prefix,
    refresh_key,
    release_key,
    rollout_prefix,
    samples_prefix,
    status_prefix,
)
from trainyard.store.protocol import Entry

Kind = Literal[
    "channel",
    "release",
    "attestations",
    "checkpoint",
    "bundle",
    "measurement",
    "samples",
    "references",
    "plan",
    "verdicts",
    "reports",
    "status",
    "evals",
    "toolchain",
    "rollout",
    "refresh",
    "lock",
    "archive",
    "proof",
    "internal",
    "unknown",
]


@dataclass(frozen=True)
class Place:
    """What a key belongs to."""

    kind: Kind
    prefix: str
    """The folder whose keys belong together, or the one key; the name of what the store keeps for
    itself."""
    model: str = ""
    """The model, where the key names it."""


@dataclass(frozen=True)
class StoredObject:
    """Keys that live and die together."""

    place: Place
    entries: tuple[Entry, ...]
    """Sorted by key."""

    @property
    def kind(self) -> Kind:
        """What it is."""
        return self.place.kind

    @property
    def prefix(self) -> str:
        """Its folder, or its one key: what it is called."""
        return self.place.prefix

    @property
    def manifest(self) -> str:
        """Key of the manifest that makes the object complete; empty if it needs or has none."""
        key = f"{self.prefix}/{MANIFEST_NAME}"
        has_one = self.kind in {"checkpoint", "bundle"}
        return key if has_one and any(entry.key == key for entry in self.entries) else ""

    @property
    def complete(self) -> bool:
        """May it be used? False for a checkpoint or bundle without its manifest."""
        return bool(self.manifest) or self.kind not in {"checkpoint", "bundle"}

    @property
    def size(self) -> int:
        """Bytes of all its keys."""
        return sum(entry.size for entry in self.entries)

    @property
    def modified_at(self) -> datetime | None:
        """When its youngest part was written; None if the store cannot tell for every part."""
        times = [entry.modified_at for entry in self.entries]
        known = [time for time in times if time is not None]
        return max(known) if known and len(known) == len(times) else None


def place_of(key: str) -> Place:
    """Return what `key` belongs to; a key of no known shape is `unknown`."""
    parts = key.split("/")
    place_in = _SHAPES.get(parts[0])
    if place_in is not None:
        try:
            place = place_in(parts[1:])
        except (BadInput, IndexError, ValueError):
            place = None
        # What is made from the parts must be the key itself, or a folder that it is in.
        if place is not None and (key == place.prefix or key.startswith(f"{place.prefix}/")):
            return place
    return Place("unknown", key)


def group(entries: Iterable[Entry]) -> dict[str, StoredObject]:
    """Return the objects that `entries` make up, by prefix, sorted."""
    found: dict[Place, list[Entry]] = {}
    for entry in entries:
        found.setdefault(place_of(entry.key), []).append(entry)
    objects = [
        StoredObject(place, tuple(sorted(parts, key=lambda entry: entry.key)))
        for place, parts in found.items()
    ]
    return {each.prefix: each for each in sorted(objects, key=lambda each: each.prefix)}


def _one(parts: list[str], length: int) -> list[str]:
    """Return the parts of a document's key, the last without `.json`."""
    if len(parts) != length or not parts[-1].endswith(".json"):
        raise ValueError(parts)
    return [*parts[:-1], parts[-1].removesuffix(".json")]


def _below(parts: list[str], length: int) -> list[str]:
    """Return the parts of the folder of a key that must lie at least so deep."""
    if len(parts) <= length:
        raise ValueError(parts)
    return parts[:length]


def _of_plan(kind: Kind, folder: str) -> Callable[[list[str]], Place]:
    def place(parts: list[str]) -> Place:
        (plan_id,) = _below(parts, 1)
        # The folders of a plan all have the same shape, which the layout checks for one of them.
        return Place(kind, f"{folder}/{status_prefix(plan_id).partition('/')[2]}")

    return place


def _rollout(parts: list[str]) -> Place:
    model, environment, number = _below(parts, 3)
    return Place("rollout", rollout_prefix(model, environment, int(number)), model)


def _checkpoint(parts: list[str]) -> Place:
    model, revision = _below(parts, 2)
    return Place("checkpoint", checkpoint_prefix(model, revision), model)


def _attestations(parts: list[str]) -> Place:
    model, release_id = _below(parts, 2)
    return Place("attestations", attestation_prefix(model, release_id), model)


def _lock(parts: list[str]) -> Place:
    return Place("lock", "/".join(["locks", *_one(parts, len(parts))]) + ".json")


_SHAPES: dict[str, Callable[[list[str]], Place]] = {
    "plans": lambda parts: Place("plan", plan_key(*_one(parts, 1))),
    "checkpoints": _checkpoint,
    "bundles": lambda parts: Place("bundle", bundle_prefix(*_below(parts, 1))),
    "measurements": lambda parts: Place("measurement", measurement_key(*_one(parts, 1))),
    "samples": lambda parts: Place("samples", samples_prefix(*_below(parts, 1))),
    "references": lambda parts: Place("references", reference_prefix(*_below(parts, 1))),
    "verdicts": _of_plan("verdicts", "verdicts"),
    "reports": _of_plan("reports", "reports"),
    "status": _of_plan("status", "status"),
    "releases": lambda parts: Place("release", release_key(*_one(parts, 2)), parts[0]),
    "attestations": _attestations,
    "channels": lambda parts: Place("channel", channel_key(*_one(parts, 2)), parts[0]),
    "rollouts": _rollout,
    "refreshes": lambda parts: Place("refresh", refresh_key(*_one(parts, 1)), parts[0][:-5]),
    "locks": _lock,
    "evals": lambda parts: Place("evals", evals_prefix(*_below(parts, 1))),
    "toolchains": lambda parts: Place("toolchain", f"toolchains/{_one(parts, 1)[0]}.json"),
    "proofs": lambda parts: Place("proof", proof_key(*_one(parts, 3))),
    "archive": lambda parts: Place("archive", "/".join(["archive", *parts])),
}
