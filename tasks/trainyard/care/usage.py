"""Who refers to what, and where the bytes are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainyard.care.decide import Decision
from trainyard.care.facts import Facts
from trainyard.store.objects import Kind


@dataclass(frozen=True)
class Usage:
    """Bytes of one kind and model."""

    kind: Kind
    model: str
    """Empty where the key does not name it, and no release or plan does."""
    objects: int
    files: int
    size: int
    freeable: int
    """Bytes that garbage collection would free."""


def referrers(facts: Facts) -> dict[str, tuple[str, ...]]:
    """Return for every object the titles of the channels, releases and plans that name it."""
    found: dict[str, set[str]] = {}
    for channel in facts.channels:
        for name in {track.release for track in channel.tracks} | channel.rollouts:
            found.setdefault(name, set()).add(channel.title)
    for naming in (*facts.releases, *facts.plans):
        for name in naming.names - {naming.key}:
            found.setdefault(name, set()).add(naming.title)
    return {name: tuple(sorted(titles)) for name, titles in found.items()}


def usage(facts: Facts, decisions: Iterable[Decision]) -> tuple[Usage, ...]:
    """Return where the bytes are, the most first."""
    models = _models(facts)
    totals: dict[tuple[Kind, str], list[int]] = {}
    for decision in decisions:
        stored = decision.object
        model = stored.place.model or models.get(stored.prefix, "")
        total = totals.setdefault((stored.kind, model), [0, 0, 0, 0])
        total[0] += 1
        total[1] += len(stored.entries)
        total[2] += stored.size
        total[3] += 0 if decision.keep else stored.size
    return tuple(
        Usage(kind, model, *total)
        for (kind, model), total in sorted(totals.items(), key=lambda item: (-item[1][2], item[0]))
    )


def _models(facts: Facts) -> Mapping[str, str]:
    """Return the model of what belongs to one model only, though its key does not say so."""
    found: dict[str, set[str]] = {}
    for naming in (*facts.releases, *facts.plans):
        owners = {
            facts.objects[name].place.model
            for name in (*naming.names, naming.key)
            if name in facts.objects and facts.objects[name].place.model
        }
        for name in (*naming.names, naming.key):
            found.setdefault(name, set()).update(owners)
    return {name: next(iter(models)) for name, models in found.items() if len(models) == 1}
