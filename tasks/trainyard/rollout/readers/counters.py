"""From the samples of one server to its counters. Pure; both readers end here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite

from trainyard.documents.look import Histogram, PodCounters, edge_of
from trainyard.rollout.readers.families import Family, Figure, families
from trainyard.serving.protocol import ServerStatus


@dataclass(frozen=True)
class Sample:
    """One number of one series."""

    name: str
    labels: Mapping[str, str]
    value: float


def pod_counters(
    samples: Iterable[Sample],
    server: ServerStatus,
    *,
    version: str | None = None,
    read_at: datetime | None = None,
    node: str = "",
) -> PodCounters:
    """Return the counters that a server's samples show; a family that is not there is missing.

    Values are summed over label sets (engines), each edge of a histogram and each reason for which
    requests end by itself.

    Args:
        samples: of one server at one moment.
        server: whose they are.
        version: of its vLLM, if known.
        read_at: the moment.
        node: the machine, if known.

    Raises:
        ValueError, LookupError, OverflowError: a value is no finite number or negative, or a
            bucket has no edge, or one that is no number.
    """
    by_name: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_name[sample.name].append(sample)
    chosen = families(version)
    tpot = _histogram(chosen, "tpot", by_name)
    events = _histogram(chosen, "events", by_name)
    finished = _counter(chosen, "finished", by_name)
    if events is None or finished is None:
        # Without a number of requests nobody knows how much the mean of events is worth.
        events = finished = None
    running, waiting = (_counter(chosen, figure, by_name) for figure in ("running", "waiting"))
    per_request = tpot is not None
    return PodCounters(
        pod=server.name,
        release_id=server.release_id,
        started_at=server.started_at,
        ttft=_histogram(chosen, "ttft", by_name),
        tpot=tpot if per_request else events,
        tpot_requests=None if per_request else finished,
        events=events if per_request else None,
        finished=finished if per_request else None,
        ended=_by_reason(chosen, by_name),
        short=_within(_histogram(chosen, "outputs", by_name), 1),
        prompts=_histogram(chosen, "prompts", by_name),
        prefix_queries=_counter(chosen, "prefix_queries", by_name),
        prefix_hits=_counter(chosen, "prefix_hits", by_name),
        in_flight=None if running is None or waiting is None else running + waiting,
        node=node,
        read_at=read_at,
        process_started_s=_gauge(chosen, "started", by_name),
    )


def _of(
    chosen: Sequence[Family], figure: Figure, by_name: Mapping[str, Sequence[Sample]]
) -> Family | None:
    """Return the best family of a figure that the server shows."""
    mine = [family for family in chosen if family.figure == figure]
    return next((one for one in mine if any(name in by_name for name in one.series)), None)


def _histogram(
    chosen: Sequence[Family], figure: Figure, by_name: Mapping[str, Sequence[Sample]]
) -> Histogram | None:
    family = _of(chosen, figure, by_name)
    if family is None:
        return None
    counts, totals = by_name.get(f"{family.name}_count"), by_name.get(f"{family.name}_sum")
    if not counts or not totals:
        return None
    buckets: dict[str, int] = {}
    for sample in by_name.get(f"{family.name}_bucket", ()) if family.with_buckets else ():
        label = sample.labels["le"]
        if edge_of(label) is None:
            raise ValueError(f"le={label!r} of {sample.name} is no number")
        buckets[label] = buckets.get(label, 0) + _whole(sample.value)
    return Histogram(
        count=sum(_whole(sample.value) for sample in counts),
        total=sum(sample.value for sample in totals),
        buckets=buckets,
    )


def _counter(
    chosen: Sequence[Family], figure: Figure, by_name: Mapping[str, Sequence[Sample]]
) -> int | None:
    family = _of(chosen, figure, by_name)
    return sum(_whole(sample.value) for sample in by_name[family.name]) if family else None


def _by_reason(
    chosen: Sequence[Family], by_name: Mapping[str, Sequence[Sample]]
) -> dict[str, int] | None:
    """Return the finished requests by reason; None if the server does not say."""
    family = _of(chosen, "finished", by_name)
    found: dict[str, int] = {}
    for sample in by_name[family.name] if family else ():
        reason = sample.labels.get("finished_reason")
        if reason is not None:
            found[reason] = found.get(reason, 0) + _whole(sample.value)
    return found or None


def _within(histogram: Histogram | None, edge: float) -> int | None:
    """Return how many values were not above an edge; None if there is no such edge."""
    return None if histogram is None else histogram.by_edge().get(edge)


def _gauge(
    chosen: Sequence[Family], figure: Figure, by_name: Mapping[str, Sequence[Sample]]
) -> float | None:
    family = _of(chosen, figure, by_name)
    return max(sample.value for sample in by_name[family.name]) if family else None


def _whole(value: float) -> int:
    if not isfinite(value) or value < 0:
        raise ValueError(f"{value} is no count")
    return int(value)
