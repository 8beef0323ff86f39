"""From the params of a run to a request of the domain; refuses what the DAG does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainyard_airflow.exceptions import StepRefused

if TYPE_CHECKING:
    from trainyard.documents.plan import ReleaseRequest


def refuse_unknown_keys(conf: Mapping[str, Any] | None, params: Mapping[str, Any]) -> None:
    """Raise StepRefused if a run's conf holds a key that is no param of its DAG.

    Airflow itself accepts such keys in silence, so that a misspelt one would change nothing. It
    even puts them among the params of the run, so only the DAG's own params tell.

    Args:
        conf: of the run.
        params: those that the DAG declares (`context["dag"].params`).
    """
    unknown = sorted(set(conf or {}) - set(params))
    if unknown:
        raise StepRefused(
            f"The conf of this run has unknown keys: {', '.join(unknown)}. "
            f"Known are: {', '.join(sorted(params))}."
        )


def release_request(context: Any) -> ReleaseRequest:
    """Return what a run of `neuron_release` asks for."""
    from pydantic import ValidationError

    from trainyard.documents.plan import ReleaseRequest

    params = context["params"]
    refuse_unknown_keys(context["dag_run"].conf, context["dag"].params)
    try:
        return ReleaseRequest(
            model=params["model"],
            revision=params["revision"] or None,
            targets=tuple(params["targets"] or ()),
            environments=tuple(params["environments"] or ()),
            overrides=params["overrides"] or {},
            accept_unproven=bool(params.get("accept_unproven")),
        )
    except ValidationError as error:
        raise StepRefused(f"The params of this run are not a release request: {error}") from error
