"""The page of one verdict."""

from __future__ import annotations

from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.plan import Plan
from trainyard.reports.pages import render


def gate_report_html(plan: Plan, measurement: Measurement, verdict: GateVerdict) -> str:
    """Return the page of `verdict`, made from `measurement` by the bounds of `plan`."""
    return render("gate.html.j2", plan=plan, measurement=measurement, verdict=verdict)
