"""The page of one release: its verdicts, its figures, what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.plan import Plan
from trainyard.documents.release import Release
from trainyard.reports.pages import render
from trainyard.spec.model import LatencyMetric


def release_report_html(
    plan: Plan,
    measurement: Measurement,
    verdicts: Sequence[GateVerdict],
    release: Release | None,
) -> str:
    """Return the page of what `plan` made for the target of `measurement`.

    Args:
        plan: the plan.
        measurement: of one target of the plan.
        verdicts: of that target; may be incomplete.
        release: None as long as nothing is published.
    """
    measured = {name for level in measurement.latency for name in level.figures}
    return render(
        "release.html.j2",
        plan=plan,
        measurement=measurement,
        verdicts=verdicts,
        release=release,
        metrics=[name for name in get_args(LatencyMetric) if name in measured],
    )
