"""Reads what the report of a release shows: the release, its verdicts, and their figures.

Nothing here decides anything. What is gone from the store is left out of the page, which says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

from trainyard.documents.base import Document
from trainyard.documents.logits import LogitReport, logits_digest
from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.plan import Plan, PlannedTarget
from trainyard.documents.release import Release
from trainyard.errors import NotFound, TrainyardError
from trainyard.gates.cost import cost_of
from trainyard.names import RELEASE_ID_PATTERN, check_name
from trainyard.releases import (
    list_attestations,
    load_release,
    peek_release,
    pins_not_held,
    release_id_of,
    resolve_release,
)
from trainyard.reports.release import ReleaseReport, TargetLine, TokenCost
from trainyard.settings import Settings
from trainyard.spec.model import Gates
from trainyard.store.documents import read_document
from trainyard.store.layout import logits_key, measurement_key, plan_key, release_key
from trainyard.store.protocol import Store

DocumentT = TypeVar("DocumentT", bound=Document)


def read_release_report(
    store: Store, model: str, release_id: str, settings: Settings
) -> ReleaseReport:
    """Return what is known of a release. One whose signature is wrong is shown, and says so.

    Raises:
        NotFound: there is no such release.
        CorruptFile: it, or a document that it rests on, cannot be read.
    """
    release, problem = _release(store, model, release_id, settings)
    verdicts = _verdicts(store, release)
    baselines = [verdict.baseline for verdict in verdicts if verdict.baseline]
    measurement = _find(store, measurement_key(release.measurement_id), Measurement)
    return ReleaseReport(
        release=release,
        problem=problem,
        verdicts=verdicts,
        measurement=measurement,
        baseline=_find(store, measurement_key(baselines[0]), Measurement) if baselines else None,
        targets=tuple(_targets(store, release, verdicts[0].plan_id)) if verdicts else (),
        lost=tuple(pins_not_held(store, release.pins)),
        parity=measurement.parity if measurement is not None else None,
        behaviour=measurement.behaviour if measurement is not None else None,
        logits=_logits(store, release),
    )


def _logits(store: Store, release: Release) -> LogitReport | None:
    settings = release.spec.gates.accuracy.logit_validation
    if settings is None:
        return None
    return _find(store, logits_key(release.measurement_id, logits_digest(settings)), LogitReport)


def find_release(store: Store, text: str) -> tuple[str, str]:
    """Return model and id of the release that `text` means.

    Args:
        text: a release id, or a model's name for its newest release.

    Raises:
        NotFound: the model has no release.
        BadInput: it can be neither.
    """
    if re.fullmatch(RELEASE_ID_PATTERN, text):
        return text.rsplit("-", 1)[0], text
    return text, resolve_release(store, check_name(text, "Model"), "latest")


def _release(store: Store, model: str, release_id: str, settings: Settings) -> tuple[Release, str]:
    """Return a release, and what is wrong with its signature."""
    try:
        return load_release(store, model, release_id, settings), ""
    except NotFound:
        raise
    except TrainyardError as error:
        return peek_release(store, model, release_id), error.message


def _verdicts(store: Store, release: Release) -> tuple[GateVerdict, ...]:
    """Return the newest verdict of each gate, in the order in which they were first given."""
    newest: dict[str, GateVerdict] = {}
    for attestation in list_attestations(store, release.model, release.release_id, kind="verdict"):
        verdict = _find(store, str(attestation.subject.get("key", "")), GateVerdict)
        if verdict is not None:
            newest[verdict.gate] = verdict
    return tuple(newest.values())


def _targets(store: Store, release: Release, plan_id: str) -> Iterator[TargetLine]:
    """Yield the targets of a plan, with what their tokens cost."""
    plan = _find(store, plan_key(plan_id), Plan)
    if plan is not None:
        for planned in plan.targets:
            yield _target(store, release, plan.spec.gates, planned)


def _target(store: Store, release: Release, gates: Gates, planned: PlannedTarget) -> TargetLine:
    release_id = release_id_of(
        release.model,
        checkpoint_digest=release.checkpoint_digest,
        compile_key=planned.compile_key,
        serving_digest=planned.serving_digest,
    )
    measurement = _find(store, measurement_key(planned.measurement_id), Measurement)
    cost = None if measurement is None else cost_of(measurement, gates, planned.price)
    why = ""
    if gates.latency.slo is None:
        why = "The spec has no SLO to price tokens at."
    elif planned.price is None:
        why = f"Nobody said what an hour of {planned.target.instance} costs."
    elif measurement is None:
        why = "It was not measured."
    elif cost is None:
        why = "No measured load met the SLO."
    return TargetLine(
        target=planned.target.name,
        instance=planned.target.instance,
        release_id=release_id if store.exists(release_key(release.model, release_id)) else "",
        price=planned.price,
        cost=None
        if cost is None
        else TokenCost(
            input_usd=cost.input_usd,
            output_usd=cost.output_usd,
            at=cost.throughput.at,
            output_tokens_per_s=cost.throughput.output_tokens_per_s,
        ),
        why_none=why,
    )


def _find(store: Store, key: str, kind: type[DocumentT]) -> DocumentT | None:
    if not key:
        return None
    try:
        return read_document(store, key, kind)
    except NotFound:
        return None
