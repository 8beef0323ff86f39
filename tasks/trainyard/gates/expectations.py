"""Expectations about figures, and how Great Expectations checks them.

Nothing passes for lack of a figure: a missing one, NaN and infinity fail, and so does a check that
could not be run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from trainyard.documents.measurement import Check
from trainyard.spec.model import Severity

_NOT_REPRODUCIBLE = "batch_markers"
"""Part of a result's `meta` that holds the time of day; without it equal inputs give equal JSON."""


_BROKEN: Final[Mapping[Severity, Literal["info", "warn", "fail"]]] = {
    "critical": "fail",
    "warning": "warn",
    "info": "info",
}
"""What a figure outside its bounds comes to, by severity."""


@dataclass(frozen=True)
class Expectation:
    """One figure and the bounds it must keep."""

    figure: str
    """Unique name of the figure, such as `busy/ttft_p99_ms`; several expectations may share it."""
    what: str
    """The figure for people, as in `Check.what`."""
    observed: float | None
    """None: it was not measured."""
    bound: str
    """In words, as in `Check.bound`."""
    minimum: float | None = None
    maximum: float | None = None
    severity: Severity = "critical"
    note: str = ""
    skipped: str = ""
    """Why there is nothing to compare with; such an expectation is shown and not checked."""
    paired: bool = False
    """Is the figure a bound from below on a difference from the stable release?"""

    @property
    def usable(self) -> float:
        """The figure as a float, NaN unless it is finite."""
        known = self.observed is not None and math.isfinite(self.observed)
        return float(self.observed) if known and self.observed is not None else math.nan


@dataclass(frozen=True)
class Evaluation:
    """What Great Expectations made of a list of expectations."""

    checks: tuple[Check, ...]
    """One for each expectation, in their order."""
    result: dict[str, Any]
    """Great Expectations' own result as JSON, without what differs from run to run."""


def evaluate(name: str, expectations: Sequence[Expectation]) -> Evaluation:
    """Check `expectations` with Great Expectations; `name` names the suite.

    A figure outside its bounds fails, warns or is shown, by the expectation's severity. A figure
    that is missing or not finite fails whatever the severity.
    """
    checked = [(index, each) for index, each in enumerate(expectations) if not each.skipped]
    nothing: dict[str, Any] = {"success": False, "results": []}
    result = _validate(name, checked) if checked else nothing
    by_index: dict[int, list[Mapping[str, Any]]] = {}
    for each in result["results"]:
        by_index.setdefault(each["expectation_config"]["meta"]["check"], []).append(each)
    checks = tuple(
        _check(expectation, by_index.get(index, []))
        for index, expectation in enumerate(expectations)
    )
    return Evaluation(checks, result)


def _validate(name: str, checked: Sequence[tuple[int, Expectation]]) -> dict[str, Any]:
    """Run Great Expectations over one row that has a column for each figure."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "False")
    import great_expectations as gx
    import pandas as pd
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from great_expectations.expectations.core.expect_column_values_to_be_between import (
        ExpectColumnValuesToBeBetween,
    )
    from great_expectations.expectations.core.expect_column_values_to_not_be_null import (
        ExpectColumnValuesToNotBeNull,
    )
    from great_expectations.expectations.expectation import Expectation as GxExpectation
    from great_expectations.expectations.metadata_types import FailureSeverity

    suite: list[GxExpectation] = []
    for index, each in checked:
        meta = {"check": index, "what": each.what, "bound": each.bound}
        suite.append(
            ExpectColumnValuesToNotBeNull(
                column=each.figure, severity=FailureSeverity.CRITICAL, meta=meta
            )
        )
        within = _paired_expectation() if each.paired else ExpectColumnValuesToBeBetween
        suite.append(
            within(
                column=each.figure,
                min_value=each.minimum,
                max_value=each.maximum,
                severity=FailureSeverity(each.severity),
                meta=meta,
            )
        )
    row = {each.figure: each.usable for _, each in checked}
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    batch = (
        context.data_sources.add_pandas("gate")
        .add_dataframe_asset("figures")
        .add_batch_definition_whole_dataframe("measurement")
        .get_batch({"dataframe": pd.DataFrame([row], dtype="float64")})
    )
    validated = batch.validate(
        gx.ExpectationSuite(name=name, expectations=suite), result_format="COMPLETE"
    )
    result: dict[str, Any] = validated.to_json_dict()
    result["meta"].pop(_NOT_REPRODUCIBLE, None)
    return result


@cache
def _paired_expectation() -> type[Any]:
    """Return the expectation that the stable release is not missed by more than a margin.

    Great Expectations has none that knows of a second release. This one is about a figure that the
    gate has computed, the bound from below on the paired difference, and its name in the result
    says what was checked. It is made when it is needed, because a class that Great Expectations
    knows needs Great Expectations.
    """
    from great_expectations.expectations.core.expect_column_values_to_be_between import (
        ExpectColumnValuesToBeBetween,
    )

    class ExpectPairedDifferenceToBeProvenAbove(ExpectColumnValuesToBeBetween):
        """Expect the bound from below on the difference from the stable release to be in bounds."""

    return ExpectPairedDifferenceToBeProvenAbove


def _check(expectation: Expectation, results: Sequence[Mapping[str, Any]]) -> Check:
    """Turn the results of one expectation (figure there, figure in bounds) into its check."""
    outcome: Literal["pass", "info", "warn", "fail", "skipped"]
    missing = math.isnan(expectation.usable)
    if expectation.skipped:
        outcome, note = "skipped", expectation.skipped
    elif missing:
        outcome, note = "fail", expectation.note or "There is no usable figure."
    elif problem := _problem(results):
        outcome, note = "fail", problem
    elif all(each["success"] is True for each in results):
        outcome, note = "pass", expectation.note
    else:
        outcome, note = _BROKEN[expectation.severity], expectation.note
    return Check(
        what=expectation.what,
        observed=None if missing else expectation.usable,
        bound=expectation.bound,
        minimum=expectation.minimum,
        maximum=expectation.maximum,
        outcome=outcome,
        severity=expectation.severity,
        note=note,
    )


def _problem(results: Sequence[Mapping[str, Any]]) -> str:
    """Return why an expectation counts as not checked, or nothing if it was."""
    for each in results:
        if message := _exception(each["exception_info"]):
            return f"It could not be checked: {message}"
    types = {each["expectation_config"]["type"] for each in results}
    if len(results) != len(types) or len(types) != 2:
        return f"It could not be checked: {len(results)} results came back where 2 were due."
    if any(each["result"].get("element_count") != 1 for each in results):
        return "It could not be checked: not exactly one figure was looked at."
    return ""


def _exception(info: Mapping[str, Any]) -> str:
    """Return the first line of the first exception in `exception_info`, which has two shapes."""
    shapes = [info] if "raised_exception" in info else list(info.values())
    for shape in shapes:
        if shape["raised_exception"]:
            return (str(shape["exception_message"]).splitlines() or ["no message"])[0]
    return ""
