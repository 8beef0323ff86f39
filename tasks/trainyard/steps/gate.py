"""The step `gate`: turn a measurement into a verdict, and stop the release if it is `fail`."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass

from trainyard.canonical import short
from trainyard.documents.base import Provenance
from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.parity import Samples
from trainyard.documents.plan import GateName, Plan, PlannedTarget
from trainyard.errors import Conflict, CorruptFile, NotFound, Refused
from trainyard.gates.verdict import Derived, derive_verdict
from trainyard.gates.words import NO_BASELINE
from trainyard.reports.gate import gate_report_html
from trainyard.steps.compile import planned_target
from trainyard.steps.context import StepContext, StepResult
from trainyard.store.documents import create_document, read_document, substance
from trainyard.store.layout import (
    expectations_key,
    gate_report_key,
    measurement_key,
    samples_key,
    verdict_key,
)
from trainyard.store.protocol import Store


@dataclass(frozen=True)
class GateInputs:
    """What a gate looks at, read from the store."""

    planned: PlannedTarget
    measurement: Measurement
    baseline: Measurement | None
    """The stable release's measurement."""
    samples: Samples | None = None
    """Of the measurement, where it has any."""
    baseline_samples: Samples | None = None
    """Of the baseline, where they are still there."""
    why_no_baseline: str = NO_BASELINE

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the measurements."""
        measurements = (self.measurement, self.baseline)
        return tuple(measurement_key(each.measurement_id) for each in measurements if each)


def gate(plan: Plan, target_name: str, gate_name: GateName, context: StepContext) -> StepResult:
    """Store the verdict of one gate on one target, with Great Expectations' result and a report.

    The verdict is written once: another run finds it, completes what is missing beside it, and ends
    the same way.

    Raises:
        Refused: the verdict is `fail`; it is stored all the same.
        NotFound: there is no measurement.
        BadInput: the plan has no such target, or its bounds make no sense.
        CorruptFile: the measurement is not the one that the plan asked for.
    """
    store = context.store
    key = verdict_key(plan.plan_id, target_name, gate_name)
    expectations = expectations_key(plan.plan_id, target_name, gate_name)
    report = gate_report_key(plan.plan_id, target_name, gate_name)
    inputs = read_inputs(plan, target_name, store)
    reused = store.exists(key)
    if not (reused and store.exists(expectations)):
        context.progress.say(f"Checking the {gate_name} figures of target {target_name}.")
        derived = derive(plan, gate_name, inputs)
        provenance = Provenance.of(context.settings, *inputs.keys)
        verdict = derived.verdict.model_copy(update={"provenance": provenance})
        context.ensure_held()
        reused = reused or not create_document(store, key, verdict)
        _create_beside(store, expectations, json.dumps(derived.result, indent=2) + "\n")
    verdict = read_document(store, key, GateVerdict)
    if not store.exists(report):
        _create_beside(store, report, gate_report_html(plan, inputs.measurement, verdict))
    if verdict.outcome == "fail":
        raise Refused(
            verdict.summary,
            hint=f"Nothing is published. The figures are in {key} and, to look at, in {report}.",
        )
    return StepResult(
        key=key,
        reused=reused,
        message=verdict.summary,
        detail={"outcome": verdict.outcome, "report": report, "baseline": verdict.baseline},
    )


def read_inputs(plan: Plan, target_name: str, store: Store) -> GateInputs:
    """Read what the gates of one target look at.

    The baseline is the stable release of the first environment asked for that has one.

    Raises:
        BadInput: the plan has no such target.
        NotFound: there is no measurement of it, or of the baseline, or not the samples of one.
        CorruptFile: the measurement is of something else.
    """
    planned = planned_target(plan, target_name)
    measurement = _read_measurement(store, planned.measurement_id, f"target {target_name}")
    _check_subject(planned, measurement)
    samples = _read_samples(store, measurement)
    for environment in plan.request.environments:
        measurement_id = planned.baselines.get(environment)
        if measurement_id:
            what = f"the stable release in {environment}"
            baseline = _read_measurement(store, measurement_id, what)
            return GateInputs(
                planned, measurement, baseline, samples, _read_samples(store, baseline)
            )
    why = next(iter(planned.incomparable.values()), NO_BASELINE)
    return GateInputs(planned, measurement, None, samples, why_no_baseline=why)


def derive(plan: Plan, gate_name: GateName, inputs: GateInputs) -> Derived:
    """Return the verdict that follows from `inputs` by the plan's own bounds."""
    return derive_verdict(
        gate_name,
        plan.spec.gates,
        plan_id=plan.plan_id,
        target=inputs.planned.target.name,
        measurement=inputs.measurement,
        baseline=inputs.baseline,
        samples=inputs.samples,
        baseline_samples=inputs.baseline_samples,
        why_no_baseline=inputs.why_no_baseline,
    )


def _read_samples(store: Store, measurement: Measurement) -> Samples | None:
    """Return the samples that a measurement names; None if it names none.

    Raises:
        NotFound: they are gone, and without them the verdict would be another one.
        CorruptFile: they are not the ones that the measurement names.
    """
    if not measurement.samples:
        return None
    try:
        samples = read_document(store, measurement.samples, Samples)
    except NotFound as error:
        raise NotFound(
            f"The samples {measurement.samples} of measurement {measurement.measurement_id} are "
            "not in the store.",
            hint="Somebody removed them; remove the measurement too, and measure again.",
        ) from error
    content = short(hashlib.sha256(substance(samples)).hexdigest())
    if samples_key(measurement.measurement_id, content) != measurement.samples:
        raise CorruptFile(
            f"{measurement.samples} does not hold the samples of measurement "
            f"{measurement.measurement_id}.",
            hint="Somebody changed or copied it; remove both and measure again.",
        )
    return samples


def _read_measurement(store: Store, measurement_id: str, what: str) -> Measurement:
    try:
        return read_document(store, measurement_key(measurement_id), Measurement)
    except NotFound as error:
        raise NotFound(
            f"There is no measurement {measurement_id} of {what}.",
            hint="No measurement, no verdict: run the step `measure` first.",
        ) from error


def _check_subject(planned: PlannedTarget, measurement: Measurement) -> None:
    """Refuse a measurement of other code or other settings than the plan's."""
    asked = (planned.measurement_id, planned.compile_key, planned.serving_digest)
    found = (measurement.measurement_id, measurement.compile_key, measurement.serving_digest)
    if asked != found:
        raise CorruptFile(
            f"{measurement_key(planned.measurement_id)} is not the measurement of target "
            f"{planned.target.name}: it has another id, compile key or serving digest.",
            hint="Somebody changed or copied it; remove it and measure again.",
        )


def _create_beside(store: Store, key: str, text: str) -> None:
    """Store what goes with a verdict; whoever was first with the same verdict stored the same."""
    with contextlib.suppress(Conflict):
        store.create(key, text.encode())
