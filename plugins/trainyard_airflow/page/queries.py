"""What each page needs to know, gathered from the store. All calls block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from trainyard.approvals import Round, rounds_in
from trainyard.documents.channel import Channel, HistoryEntry, Rollout
from trainyard.documents.evidence import Block, Verdict
from trainyard.documents.look import Look
from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.plan import Plan, plan_id_of_run
from trainyard.documents.release import Attestation, Release
from trainyard.documents.status import StepStatus
from trainyard.errors import NotFound, TrainyardError
from trainyard.releases import list_attestations, load_release
from trainyard.reports.diff import Difference, differences
from trainyard.reports.glance import Glance, glance
from trainyard.rollout.driver import OUTCOME_EVENTS, number_of_run
from trainyard.rollout.outbox import RolloutEvent
from trainyard.rollout.slices import blocks_from_snapshots
from trainyard.settings import Settings
from trainyard.steps.status import list_statuses
from trainyard.store.layout import (
    ATTESTATIONS,
    gate_report_key,
    measurement_key,
    plan_key,
    release_prefix,
    rollout_prefix,
)
from trainyard_airflow.page.reader import Reader, Unreadable, as_json, newest_first

Show = Literal["all", "moving", "trouble"]


# --- the overview -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overview:
    """All channels that somebody may see."""

    rows: tuple[Glance, ...]
    unreadable: tuple[Unreadable, ...]
    total: int
    """Rows before the filter."""
    moving: int
    """Rollouts under way, before the filter."""
    releases: dict[str, int]
    """Published releases by model."""


def overview(
    reader: Reader,
    channels: Iterable[Channel | Unreadable],
    environments: Sequence[str],
    *,
    text: str = "",
    show: Show = "all",
) -> Overview:
    """Return the rows of the overview.

    Args:
        reader: of the store.
        channels: all of them.
        environments: those to show, in their order.
        text: only rows in which a name contains it.
        show: `moving` has only rollouts under way, `trouble` only rows that need a look.
    """
    order = {name: index for index, name in enumerate(environments)}
    found = [each for each in channels if each.environment in order]
    found.sort(key=lambda each: (each.model, order[each.environment]))
    rows = [glance(each) for each in found if isinstance(each, Channel)]
    return Overview(
        rows=tuple(row for row in rows if _wanted(row, text.strip().lower(), show)),
        unreadable=tuple(each for each in found if isinstance(each, Unreadable)),
        total=len(rows),
        moving=sum(row.in_progress for row in rows),
        releases=_count_releases(reader.keys("releases")),
    )


def _wanted(row: Glance, text: str, show: Show) -> bool:
    if show == "moving" and not row.in_progress:
        return False
    if show == "trouble" and row.tone not in ("warn", "fail"):
        return False
    names = (row.model, row.environment, row.stable, row.candidate, row.state, row.by)
    return not text or any(text in name.lower() for name in names)


def _count_releases(keys: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in keys:
        parts = key.split("/")
        if len(parts) == 3 and key.endswith(".json"):
            counts[parts[1]] = counts.get(parts[1], 0) + 1
    return counts


# --- a rollout ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutView:
    """A rollout, under way or over."""

    number: int
    release_id: str
    rollout: Rollout | None
    """None for rollouts before the last one: their plan is not kept."""
    looks: tuple[Look, ...]
    verdicts: tuple[Verdict, ...]
    blocks: tuple[Block, ...]
    """Figures of both releases, slice by slice."""
    events: tuple[HistoryEntry, ...]
    """Oldest first."""
    outcome: str
    reason: str

    @property
    def last(self) -> Verdict | None:
        """What the judge said last."""
        if self.verdicts:
            return self.verdicts[-1]
        return self.rollout.verdict if self.rollout else None


def rollout_view(reader: Reader, channel: Channel, number: int) -> RolloutView:
    """Return a rollout of a channel. Raises NotFound if it had none of that number."""
    rollout = channel.rollout if channel.rollout and channel.rollout.number == number else None
    events = _events(reader, channel, number)
    if rollout is None and not events:
        raise NotFound(
            f"{channel.model} has no rollout {number} in {channel.environment}.",
            hint="The channel's page lists its rollouts.",
        )
    looks = _looks(reader, channel, number)
    started = next((each for each in events if each.event == "rollout_started"), None)
    release_id = rollout.release_id if rollout else started.release_id if started else ""
    ended = next((each for each in reversed(events) if each.event in OUTCOME_EVENTS), None)
    return RolloutView(
        number=number,
        release_id=release_id,
        rollout=rollout,
        looks=tuple(looks),
        verdicts=tuple(look.verdict for look in looks if look.verdict),
        blocks=_blocks(looks, rollout),
        events=tuple(events),
        outcome=(rollout.outcome or "")
        if rollout
        else OUTCOME_EVENTS[ended.event]
        if ended
        else "",
        reason=rollout.reason if rollout else str(ended.detail.get("why", "")) if ended else "",
    )


def _events(reader: Reader, channel: Channel, number: int) -> list[HistoryEntry]:
    """Return what happened, from the channel's history and from the events that are kept longer."""
    found = {
        (entry.generation, entry.event): entry
        for entry in channel.history
        if entry.rollout == number
    }
    if channel.rollout is None or channel.rollout.number != number:
        folder = f"{rollout_prefix(channel.model, channel.environment, number)}/events"
        keys = [key for key in reader.keys(folder) if "/rollout-" in key]
        for event in reader.documents(keys, RolloutEvent):
            found.setdefault((event.entry.generation, event.entry.event), event.entry)
    return sorted(found.values(), key=lambda entry: (entry.generation, entry.at))


def _looks(reader: Reader, channel: Channel, number: int) -> list[Look]:
    folder = f"{rollout_prefix(channel.model, channel.environment, number)}/looks"
    return reader.documents(reader.keys(folder), Look)


def _blocks(looks: Sequence[Look], rollout: Rollout | None) -> tuple[Block, ...]:
    if rollout is None or rollout.exposed_since is None or not rollout.reference_id:
        return ()
    return tuple(
        blocks_from_snapshots(
            [look.snapshot for look in looks],
            exposed_since=rollout.exposed_since,
            candidate=rollout.release_id,
            stable=rollout.reference_id,
        )
    )


# --- approvals ----------------------------------------------------------------------------------

SHOWN_ROUNDS = 5
"""Rounds of approval that a channel's page shows, newest first."""


def approval_rounds(reader: Reader, model: str, environment: str) -> tuple[Round, ...]:
    """Return the last rounds in which promotions to a channel asked for approval, newest first."""
    keys = [
        key
        for key in reader.keys(f"{ATTESTATIONS}/{model}")
        if key.rpartition("/")[2].startswith("approval-")
    ]
    rounds = rounds_in(reader.documents(keys, Attestation))
    return tuple(each for each in rounds if each.environment == environment)[:SHOWN_ROUNDS]


def rollout_of_run(
    reader: Reader, environment: str, dag_id: str, run_id: str
) -> tuple[Channel, int] | None:
    """Return the channel and the number of the rollout that a run started, if it started one."""
    for channel in reader.channels():
        if isinstance(channel, Channel) and channel.environment == environment:
            number = number_of_run(channel, f"{dag_id}/{run_id}")
            if number is not None:
                return channel, number
    return None


# --- a release ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A gate's verdict about a release."""

    verdict: GateVerdict
    has_report: bool


@dataclass(frozen=True)
class Place:
    """A role of a release in an environment."""

    environment: str
    role: str
    """`stable`, `candidate`, `earlier` or `rejected`."""
    weight: int | None
    since: Any


@dataclass(frozen=True)
class ReleaseView:
    """All that is known of a release."""

    release: Release
    signature: str
    """Empty if a trusted key signed it, else what is wrong."""
    judged: tuple[Judged, ...]
    measurement: Measurement | None
    places: tuple[Place, ...]
    attestations: tuple[Attestation, ...]
    others: tuple[str, ...]
    """Ids of the model's other releases."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its verdicts warn of, the newest first, each once."""
        return tuple(dict.fromkeys(words for each in self.attestations for words in each.warnings))


def release_view(reader: Reader, model: str, release_id: str, settings: Settings) -> ReleaseView:
    """Return a release with all that was found out about it. Raises NotFound."""
    release, problem = _checked_release(reader, model, release_id, settings)
    attestations = tuple(newest_first(list_attestations(reader.store, model, release_id)))
    return ReleaseView(
        release=release,
        signature=problem,
        judged=_judged(reader, attestations),
        measurement=_measurement(reader, release.measurement_id),
        places=_places(reader, model, release_id),
        attestations=attestations,
        others=tuple(each for each in release_ids(reader, model) if each != release_id),
    )


def with_places(view: ReleaseView, places: tuple[Place, ...]) -> ReleaseView:
    """Return what is known of a release, with only these places."""
    return replace(view, places=places)


def read_release(reader: Reader, model: str, release_id: str) -> Release:
    """Return a release as it is stored. Raises NotFound."""
    return reader.release(model, release_id)


def release_ids(reader: Reader, model: str) -> list[str]:
    """Return the ids of all releases of a model, sorted."""
    prefix = f"{release_prefix(model)}/"
    return [
        key.removeprefix(prefix).removesuffix(".json")
        for key in reader.keys(release_prefix(model))
        if key.endswith(".json")
    ]


def releases_of(reader: Reader, model: str) -> list[Release]:
    """Return all releases of a model, newest first. Raises NotFound if it has none."""
    ids = release_ids(reader, model)
    if not ids:
        raise NotFound(f"Model {model} has no release.", hint="Start one: DAG `neuron_release`.")
    return newest_first(reader.releases(model, ids))


def difference_of(first: Release, second: Release) -> tuple[Difference, ...]:
    """Return the fields in which two releases differ; not those that differ by nature."""
    return differences(_subject(first), _subject(second))


def _subject(release: Release) -> dict[str, Any]:
    return {
        name: value
        for name, value in as_json(release).items()
        if name not in {"schema", "signature", "release_id"}
    }


def _checked_release(
    reader: Reader, model: str, release_id: str, settings: Settings
) -> tuple[Release, str]:
    """Return a release, and what is wrong with its signature; nothing if a trusted key made it."""
    try:
        return load_release(reader.store, model, release_id, settings), ""
    except NotFound:
        raise
    except TrainyardError as error:
        return read_release(reader, model, release_id), str(error)


def _judged(reader: Reader, attestations: Iterable[Attestation]) -> tuple[Judged, ...]:
    found = []
    for attestation in attestations:
        key = attestation.subject.get("key")
        if attestation.kind != "verdict" or not isinstance(key, str):
            continue
        try:
            verdict = reader.document(key, GateVerdict)
        except NotFound:
            continue
        report = gate_report_key(verdict.plan_id, verdict.target, verdict.gate)
        found.append(Judged(verdict, reader.store.exists(report)))
    return tuple(found)


def _measurement(reader: Reader, measurement_id: str) -> Measurement | None:
    try:
        return reader.document(measurement_key(measurement_id), Measurement)
    except NotFound:
        return None


def _places(reader: Reader, model: str, release_id: str) -> tuple[Place, ...]:
    places = []
    for channel in reader.channels(model=model):
        if not isinstance(channel, Channel):
            continue
        name = channel.environment
        if channel.stable and channel.stable.release_id == release_id:
            places.append(Place(name, "stable", channel.weights.stable, channel.stable.since))
        if channel.candidate and channel.candidate.release_id == release_id:
            weight = channel.weights.candidate
            places.append(Place(name, "candidate", weight, channel.candidate.since))
        places += [
            Place(name, "earlier", None, track.since)
            for track in channel.previous
            if track.release_id == release_id
        ]
        places += [
            Place(name, "rejected", None, each.at)
            for each in channel.rejected
            if each.release_id == release_id
        ]
    return tuple(places)


# --- a run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReleaseRun:
    """A run of `neuron_release`: its plan, its steps and what they made."""

    plan: Plan
    statuses: tuple[StepStatus, ...]
    verdicts: tuple[Judged, ...]
    releases: tuple[str, ...]


def release_run(reader: Reader, dag_id: str, run_id: str) -> ReleaseRun | None:
    """Return what a run of `neuron_release` has done so far; None if it has no plan yet."""
    plan = _plan_of_run(reader, dag_id, run_id)
    if plan is None:
        return None
    statuses = tuple(list_statuses(reader.store, plan.plan_id))
    verdicts = []
    for status in statuses:
        if status.step.endswith("-gate") and status.output_key:
            verdict = reader.document(status.output_key, GateVerdict)
            report = gate_report_key(verdict.plan_id, verdict.target, verdict.gate)
            verdicts.append(Judged(verdict, reader.store.exists(report)))
    releases = tuple(
        status.output_key.rsplit("/", 1)[-1].removesuffix(".json")
        for status in statuses
        if status.step == "publish" and status.output_key
    )
    return ReleaseRun(plan, statuses, tuple(verdicts), releases)


def _plan_of_run(reader: Reader, dag_id: str, run_id: str) -> Plan | None:
    """Return the plan of a run. The end of its id tells the run, so the listing is enough."""
    ending = plan_id_of_run("", dag_id, run_id)
    for key in reader.keys("plans"):
        plan_id = key.removeprefix("plans/").removesuffix(".json")
        if plan_id.endswith(ending) and len(plan_id) > len(ending):
            return reader.document(plan_key(plan_id), Plan)
    return None
