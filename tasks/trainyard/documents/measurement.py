"""Measurements (raw figures) and verdicts (what a gate made of them)."""

from __future__ import annotations

from typing import Any, Literal

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


class LevelFigures(Frozen):
    """One load level: raw figures of vLLM's serving benchmark."""

    name: str
    figures: dict[str, float]
    """Keys as in `trainyard.spec.model.LatencyMetric`."""
    duration_s: float
    completed: int


class StartFigures(Frozen):
    """How the measured server started, and the proof that it used its bundle."""

    ready_s: float
    engine_init_s: float | None
    new_cache_files: tuple[str, ...]
    """Must be empty for a start that used its bundle."""


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
    parity: ParityFigures | None = None
    """Served answers against the reference; None: the spec did not ask."""
    samples: str = ""
    """Key of the samples that the figures are made of; empty: of an earlier version, or none."""


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
