"""Tells where the store, Airflow's database and what really serves do not agree.

Each of the three is backed up and restored by itself. Restored from copies of different moments,
they contradict each other, though each of them is whole: this finds where. Pure; a person decides.

What serves is newest always: it was never restored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from trainyard.care.verify import Problem
from trainyard.documents.channel import Channel
from trainyard.store.layout import channel_key, release_key, rollout_prefix

ENDED = frozenset({"success", "failed"})
"""States in which Airflow does nothing more for a run."""

_PROMOTE = re.compile(r"promote__(?P<release>.+)__g(?P<generation>\d+)(?:__\d+)?")
"""Ids of the runs that a release DAG starts: they name the generation that they found."""


@dataclass(frozen=True)
class Run:
    """A run that Airflow knows."""

    dag_id: str
    run_id: str
    state: str

    @property
    def name(self) -> str:
        """As channels and releases name it."""
        return f"{self.dag_id}/{self.run_id}"


@dataclass(frozen=True)
class Served:
    """What serves a channel now."""

    ready: Mapping[str, int] = field(default_factory=dict)
    """Ready servers by release id."""
    generation: int | None = None
    """Of the channel that the route follows; None: there is no route, or nobody could ask."""


@dataclass(frozen=True)
class Published:
    """A release in the store, and the run that made it."""

    model: str
    release_id: str
    dag_run: str = ""


@dataclass(frozen=True)
class World:
    """Everything that is compared."""

    channels: tuple[Channel, ...]
    releases: tuple[Published, ...] = ()
    rollouts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """The highest number of a rollout that left documents, by environment and model."""
    served: Mapping[tuple[str, str], Served] = field(default_factory=dict)
    """By environment and model; channels that nobody could ask about are missing."""
    runs: tuple[Run, ...] | None = None
    """None: Airflow was not asked."""
    whole: frozenset[str] = frozenset()
    """DAGs whose runs are all in `runs`, down to the first."""


def disagreements(world: World) -> list[Problem]:
    """Return what contradicts something else, sorted by key."""
    found: list[Problem] = []
    for channel in world.channels:
        found += _older_than_its_log(world, channel)
        found += _older_than_what_serves(world, channel)
        found += _without_servers(world, channel)
        if world.runs is not None:
            found += _driver(world, world.runs, channel)
            found += _older_than_airflow(world, world.runs, channel)
    found += _releases_without_run(world)
    return sorted(set(found), key=lambda each: (each.key, each.kind, each.message))


def _key(channel: Channel) -> str:
    return channel_key(channel.model, channel.environment)


def _place(channel: Channel) -> tuple[str, str]:
    return channel.environment, channel.model


def _older_than_its_log(world: World, channel: Channel) -> Iterator[Problem]:
    known = channel.rollout.number if channel.rollout else 0
    newest = world.rollouts.get(_place(channel), 0)
    if newest > known:
        folder = rollout_prefix(channel.model, channel.environment, newest)
        yield Problem(
            _key(channel),
            "wrong",
            f"It knows {known} rollouts, but {folder}/ is there: the channel is older than the "
            "rest of the store.",
        )


def _older_than_what_serves(world: World, channel: Channel) -> Iterator[Problem]:
    served = world.served.get(_place(channel), Served())
    if served.generation is not None and served.generation > channel.generation:
        yield Problem(
            _key(channel),
            "wrong",
            f"It is at generation {channel.generation}, but the route follows generation "
            f"{served.generation}: the store is older than what serves.",
        )
    roles = {track.release_id for track in (channel.stable, channel.candidate) if track}
    roles |= {track.release_id for track in channel.previous}
    if channel.rollout is not None:
        roles |= {channel.rollout.release_id, channel.rollout.reference_id}
    stored = {each.release_id for each in world.releases}
    for release, number in sorted(served.ready.items()):
        if release in roles or number == 0:
            continue
        yield Problem(
            _key(channel),
            "wrong",
            f"{release} has {_servers(number)}, but the channel gives it no role: the store is "
            "older than what serves, or somebody else started them.",
        )
        if release not in stored:
            yield Problem(
                release_key(channel.model, release),
                "missing",
                f"{_servers(number).capitalize()} of it run in {channel.environment}.",
            )


def _without_servers(world: World, channel: Channel) -> Iterator[Problem]:
    served = world.served.get(_place(channel))
    if served is None or channel.stable is None:
        return
    if not served.ready.get(channel.stable.release_id, 0):
        yield Problem(
            _key(channel),
            "wrong",
            f"{channel.stable.release_id} is stable and has no ready server.",
        )


def _driver(world: World, runs: Iterable[Run], channel: Channel) -> Iterator[Problem]:
    if channel.rollout is None:
        return
    name = channel.rollout.driver.run_id
    run = next((each for each in runs if each.name == name), None)
    if not channel.in_progress:
        if run is None and name.partition("/")[0] in world.whole:
            yield Problem(
                _key(channel),
                "note",
                f"Airflow does not know the run of its last rollout, {name}: its database is "
                "older, or was cleaned. What serves is as it should be.",
            )
        return
    where = f"Rollout {channel.rollout.number} is under way ({channel.rollout.phase})"
    if run is None and name.partition("/")[0] in world.whole:
        yield Problem(
            _key(channel),
            "wrong",
            f"{where}, but Airflow does not know its run {name}: nobody drives it. Airflow's "
            "database is older than the store.",
        )
    elif run is not None and run.state in ENDED:
        yield Problem(
            _key(channel),
            "wrong",
            f"{where}, but its run {name} ended as {run.state}: nobody drives it.",
        )


def _older_than_airflow(world: World, runs: Iterable[Run], channel: Channel) -> Iterator[Problem]:
    stored = {each.release_id for each in world.releases}
    for run in runs:
        if run.dag_id != f"neuron_promote__{channel.environment}":
            continue
        asked = _PROMOTE.fullmatch(run.run_id)
        if asked is None or asked["release"].rpartition("-")[0] != channel.model:
            continue
        if int(asked["generation"]) > channel.generation:
            yield Problem(
                _key(channel),
                "wrong",
                f"It is at generation {channel.generation}, but Airflow's run {run.run_id} found "
                f"generation {asked['generation']}: the store is older than Airflow's database.",
            )
        if run.state == "success" and asked["release"] not in stored:
            yield Problem(
                release_key(channel.model, asked["release"]),
                "missing",
                f"Airflow's run {run.run_id} promoted it to {channel.environment}.",
            )


def _releases_without_run(world: World) -> Iterator[Problem]:
    known = {run.name for run in world.runs or ()}
    for release in world.releases:
        dag_id = release.dag_run.partition("/")[0]
        if world.runs is None or dag_id not in world.whole or release.dag_run in known:
            continue
        yield Problem(
            release_key(release.model, release.release_id),
            "note",
            f"Airflow does not know the run that published it, {release.dag_run}: its database is "
            "older, or was cleaned. The release is as good as before.",
        )


def _servers(number: int) -> str:
    return f"{number} ready server{'s' if number > 1 else ''}"
