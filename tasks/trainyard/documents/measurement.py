"""Measurements (raw figures) and verdicts (what a gate made of them)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from trainyard.documents.base import Document, Frozen
from trainyard.documents.behaviour import Behaviour
from trainyard.documents.parity import ParityFigures


class TaskScore(Frozen):
    """One accuracy task."""

    name: str
    metric: str
    score: float
    """Share of 1."""
    stderr: float | None = None
    samples: int
    version: str = ""


QUANTILES = tuple(percent / 100 for percent in range(0, 101, 5))
"""Where the distributions of a level are kept: the least, every twentieth, and the most."""


class LevelFigures(Frozen):
    """One load level: raw figures of vLLM's serving benchmark."""

    name: str
    figures: dict[str, float]
    """Keys as in `trainyard.spec.model.LatencyMetric`. Medians over the repeats, except
    `failed_requests`: the most of any repeat."""
    duration_s: float
    """Of all repeats together."""
    completed: int
    """Requests of the repeat that completed the fewest."""
    repeats: int = 1
    spread: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """The lowest and the highest of the repeats, by figure; empty for a single repeat."""
    distributions: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """`ttft_ms`, `tpot_ms`, `e2e_ms` of the requests of all repeats, at each of `QUANTILES`."""
    input_tokens: tuple[int, int] | None = None
    """The fewest and the most tokens of a prompt."""
    output_tokens: tuple[int, int] | None = None
    """As `input_tokens`, of an answer."""
    peak_concurrency: int | None = None
    """The most requests that were in flight."""
    request_rate: float | None = None
    """Requests a second that were asked for; None: as fast as the concurrency allowed."""
    max_concurrency: int | None = None
    """Requests in flight that were allowed; None: any number."""
    errors: tuple[str, ...] = ()
    """What failed requests said, each text once and at most three."""


class RateProbe(Frozen):
    """One request rate that was tried."""

    rate_per_s: float
    """What was asked for."""
    requests: int
    completed: int
    attainment: float
    """Share of the requests that kept the SLO, as a share of 1."""
    meets: bool
    figures: dict[str, float]
    """As of a level."""
    duration_s: float
    peak_concurrency: int | None = None
    """The most requests that were in flight."""


class RateFound(Frozen):
    """The highest request rate that meets the SLO."""

    level: str
    """Whose prompts and answers were used."""
    rate_per_s: float | None
    """The highest that met the SLO; None: not even the lowest that was tried did."""
    failing_rate_per_s: float | None
    """The lowest that did not; None: all that were tried met it, so there may be a higher one."""
    complete: bool
    """Are the two as near to each other as was asked for, or is the rate as high as may be?"""
    reason: str
    """Why it ended, in one sentence."""
    probes: tuple[RateProbe, ...]
    """In the order in which they were tried."""

    @property
    def best(self) -> RateProbe | None:
        """The probe at the highest rate that met the SLO."""
        met = [probe for probe in self.probes if probe.rate_per_s == self.rate_per_s]
        return met[-1] if met else None


class Envelope(Frozen):
    """The loads that were measured: what live traffic brings beyond them, nobody has tried.

    Of the load levels, and of the highest rate that met the SLO where it was looked for.
    """

    input_tokens: tuple[int, int]
    """The fewest and the most tokens of a prompt."""
    output_tokens: tuple[int, int]
    max_concurrency: int
    """The most requests that were in flight."""
    max_requests_per_s: float
    """The highest rate at which requests were completed."""


class StartFigures(Frozen):
    """How the measured server started, and the proof that it used its bundle."""

    ready_s: float
    engine_init_s: float | None
    new_cache_files: tuple[str, ...]
    """Must be empty for a start that used its bundle."""
    cold_s: float | None = None
    """Seconds that the start took which compiled the bundle; None: it was imported."""


class Measurement(Document):
    """`measurements/<measurement id>.json`."""

    measurement_id: str
    model: str
    revision: str
    checkpoint_digest: str
    compile_key: str
    serving_digest: str
    target: str
    lane: str
    start: StartFigures
    accuracy: tuple[TaskScore, ...]
    latency: tuple[LevelFigures, ...]
    behaviour: Behaviour | None = None
    """None: it was not measured."""
    machine: dict[str, Any]
    """CPU or device model, cores, memory, kernel, driver: what was seen."""
    toolchain: dict[str, str]
    instance: str = ""
    """Of the target: `local`, or the EC2 instance type. Empty: an earlier version did not say."""
    search: RateFound | None = None
    """None: it was not asked for."""
    envelope: Envelope | None = None
    """None: an earlier version, or nothing of the load completed."""
    parity: ParityFigures | None = None
    """Served answers against the reference; None: the spec did not ask."""
    samples: str = ""
    """Key of the samples that the figures are made of; empty: of an earlier version, or none."""

    @property
    def kind(self) -> dict[str, Any]:
        """The kind of machine and the driver that it was made on."""
        return machine_kind(self.machine, self.instance)


_KIND = ("processor", "cores", "threads", "neuron_driver")
"""What of a machine makes figures comparable; `host` or `load_1min` do not."""


def machine_kind(machine: Mapping[str, Any], instance: str) -> dict[str, Any]:
    """Return what must be the same of two machines for their latencies to be comparable.

    Args:
        machine: as `trainyard.measure.machine` describes it.
        instance: of the target; `local` says nothing.
    """
    kind = {name: machine[name] for name in _KIND if machine.get(name)}
    return kind if instance in ("", "local") else {**kind, "instance": instance}


class Check(Frozen):
    """One expectation of a gate."""

    what: str
    """Such as `adder exact_match` or `level busy: ttft_p99_ms`."""
    observed: float | None
    bound: str
    """In words: `>= 0.95`, `<= 400`, `>= stable (0.97) - 0.02`."""
    minimum: float | None = None
    """The bound's lower limit as a number, where it has one."""
    maximum: float | None = None
    """The bound's upper limit as a number, where it has one."""
    low: float | None = None
    """The lowest of the repeats; None: there was one, or the figure is no figure of a load."""
    high: float | None = None
    """The highest of the repeats."""
    outcome: Literal["pass", "info", "warn", "fail", "skipped"]
    """`info`: outside its bound, which is for people only."""
    severity: Literal["critical", "warning", "info"] = "critical"
    note: str = ""


class GateVerdict(Document):
    """`verdicts/<plan id>/<target>/<gate>.json`: pass, warn or fail, with all figures."""

    gate: Literal["accuracy", "latency"]
    plan_id: str
    target: str
    measurement_id: str
    outcome: Literal["pass", "warn", "fail"]
    checks: tuple[Check, ...]
    baseline: str = ""
    """Measurement id of the stable release it was compared with, if any."""
    summary: str
    """One sentence with the figures that decided."""
    raw_data: tuple[str, ...] = ()
    """Keys of what the figures come from: measurements, and samples where there are any."""
