"""The page of one release: its verdicts first, then its figures and what it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

from trainyard.documents.logits import LogitReport
from trainyard.documents.measurement import GateVerdict, LevelFigures, Measurement
from trainyard.documents.plan import Price
from trainyard.documents.release import Release
from trainyard.reports.pages import render
from trainyard.reports.plots import (
    HEIGHT,
    MARKS,
    ROW,
    WIDTH,
    BarRow,
    Counts,
    Plot,
    bar_rows,
    distribution_plots,
    load_plots,
    position_plot,
    score_plots,
)
from trainyard.spec.model import LatencyMetric

_WORST = ("fail", "warn", "pass")


@dataclass(frozen=True)
class TokenCost:
    """What the tokens of one target cost, in US dollars."""

    input_usd: float
    output_usd: float
    at: str
    """At which load, in words."""
    output_tokens_per_s: float


@dataclass(frozen=True)
class TargetLine:
    """One target of the release's plan, in the ranking by cost."""

    target: str
    instance: str
    release_id: str
    """Empty: it has no release."""
    price: Price | None
    cost: TokenCost | None
    why_none: str = ""
    """Why there is no cost."""


class ParityShown(Protocol):
    """What the page shows of parity with the reference."""

    @property
    def compared(self) -> int:
        """Positions that were compared."""

    @property
    def agreed(self) -> int:
        """Of those, how many have the reference's token."""

    @property
    def excused(self) -> int:
        """Of the others, how many may differ."""

    @property
    def first_divergence(self) -> int:
        """Tokens before the first divergence of the worst answer."""

    @property
    def by_position(self) -> Sequence[Counts]:
        """The same for each position of the answers."""


class BehaviourShown(Protocol):
    """What the page shows of a server's behaviour."""

    @property
    def records(self) -> Sequence[Any]:
        """One for each check: `name`, `capability` (`ability`, `why`), `remark`, `count(outcome)`
        and `first(outcome)` (`sent`, `came`, `expected`)."""


@dataclass(frozen=True)
class ReleaseReport:
    """All that the page shows."""

    release: Release
    problem: str
    """What is wrong with its signature; empty: a trusted key made it."""
    verdicts: tuple[GateVerdict, ...]
    """The newest of each gate."""
    measurement: Measurement | None
    baseline: Measurement | None
    """The stable release's measurement that the verdicts compared with."""
    targets: tuple[TargetLine, ...]
    """All targets of the plan."""
    lost: tuple[str, ...] = ()
    """Keys of documents that the release rests on and that are gone or changed."""
    parity: ParityShown | None = None
    """None: it was not measured."""
    behaviour: BehaviourShown | None = None
    logits: LogitReport | None = None
    """AWS's logit validation; None: it was not asked for, or is not there."""

    @property
    def outcome(self) -> str:
        """The worst outcome of the gates; empty if none is known."""
        outcomes = {verdict.outcome for verdict in self.verdicts}
        return next((each for each in _WORST if each in outcomes), "")


def release_report_html(report: ReleaseReport) -> str:
    """Return the page of a release: one file that needs nothing from outside and runs nothing."""
    release, measurement, baseline = report.release, report.measurement, report.baseline
    gates = release.spec.gates
    levels = measurement.latency if measurement else ()
    parity = report.parity
    return render(
        "release.html.j2",
        report=report,
        release=release,
        measurement=measurement,
        baseline=baseline,
        gates=gates,
        tiles=tuple(_tiles(report)),
        metrics=_metrics(levels),
        stable_levels={level.name: level for level in (baseline.latency if baseline else ())},
        load_plots=load_plots(measurement, gates.latency.slo) if measurement else (),
        distributions=tuple(_distributions(levels, baseline)),
        scores=score_plots(measurement, baseline, gates.accuracy.tasks) if measurement else (),
        parity=parity,
        positions=position_plot(parity.by_position) if parity else None,
        behaviour=report.behaviour,
        ranking=rank(report.targets),
        cost_bars=_cost_bars(report),
        start_bars=_start_bars(measurement, baseline),
        marks=MARKS,
        width=WIDTH,
        height=HEIGHT,
        row=ROW,
    )


def rank(targets: Sequence[TargetLine]) -> tuple[TargetLine, ...]:
    """Return the targets by the cost of their output tokens, the cheapest first, unknown last."""
    return tuple(
        sorted(targets, key=lambda each: (each.cost is None, each.cost and each.cost.output_usd))
    )


def _metrics(levels: Sequence[LevelFigures]) -> list[str]:
    measured = {name for level in levels for name in level.figures}
    return [name for name in get_args(LatencyMetric) if name in measured]


def _distributions(
    levels: Sequence[LevelFigures], baseline: Measurement | None
) -> Iterator[tuple[str, tuple[Plot, ...]]]:
    stable = {level.name: level for level in (baseline.latency if baseline else ())}
    for level in levels:
        if plots := distribution_plots(level, stable.get(level.name)):
            yield level.name, plots


def _tiles(report: ReleaseReport) -> Iterator[tuple[str, str]]:
    """Yield the figures that people look for first, each with what it is."""
    measurement = report.measurement
    if measurement is None:
        return
    for score in measurement.accuracy[:1]:
        yield f"{score.score:.3g}", f"{score.name} {score.metric}"
    if measurement.search is not None:
        rate = measurement.search.rate_per_s
        yield ("none" if rate is None else f"{rate:.4g}"), "requests a second within the SLO"
    busiest = max(
        measurement.latency,
        key=lambda level: level.figures.get("output_tokens_per_s", 0.0),
        default=None,
    )
    if busiest is not None and "output_tokens_per_s" in busiest.figures:
        tokens = busiest.figures["output_tokens_per_s"]
        yield f"{tokens:,.0f}", f"output tokens a second, level {busiest.name}"
        if "ttft_p99_ms" in busiest.figures:
            yield f"{busiest.figures['ttft_p99_ms']:.3g} ms", f"TTFT p99, level {busiest.name}"
    own = next((each.cost for each in report.targets if _is_own(each, report) and each.cost), None)
    if own is not None:
        yield f"${own.output_usd:.3g}", "a million output tokens"
    yield f"{measurement.start.ready_s:.3g} s", "start from the bundle"


def _is_own(line: TargetLine, report: ReleaseReport) -> bool:
    return line.target == report.release.target.name


def _cost_bars(report: ReleaseReport) -> tuple[BarRow, ...]:
    return bar_rows(
        [
            (
                line.target,
                line.cost.output_usd,
                f"${line.cost.output_usd:.3g}",
                _is_own(line, report),
            )
            for line in rank(report.targets)
            if line.cost is not None
        ]
    )


def _start_bars(
    measurement: Measurement | None, baseline: Measurement | None
) -> tuple[BarRow, ...]:
    if measurement is None:
        return ()
    start = measurement.start
    rows = [("from the bundle", start.ready_s, True)]
    if start.cold_s is not None:
        rows.append(("compiling", start.cold_s, True))
    if baseline is not None:
        rows.append(("stable, from its bundle", baseline.start.ready_s, False))
    return bar_rows([(label, value, f"{value:.3g} s", own) for label, value, own in rows])
