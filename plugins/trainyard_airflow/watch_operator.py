"""Looks after channels once their rollouts are over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.sdk import BaseOperator, Context

from trainyard_airflow.exceptions import StepRefused

if TYPE_CHECKING:
    from trainyard.rollout.watcher import Finding


class WatchOperator(BaseOperator):
    """Look at every channel once, start the rollbacks that are due, and fail if there is news.

    A failed run is what tells people: its log and its notice have the findings. A run that finds
    what people know already succeeds.

    Returns the number of findings.
    """

    def execute(self, context: Context) -> int:
        """Raise StepRefused with all that is new."""
        from functools import partial

        from trainyard.rollout.watcher import watch_all
        from trainyard.settings import get_settings
        from trainyard.wiring import open_rollout
        from trainyard_airflow.notify import tell_rollout_event

        notify = partial(tell_rollout_event, run=f"{context['dag'].dag_id}/{context['run_id']}")
        found = watch_all(open_rollout(get_settings(), notify=notify).deps, _roll_back)
        for finding in found:
            level = self.log.warning if finding.is_news else self.log.info
            level("%s in %s: %s", finding.model, finding.environment, finding.message)
        news = [finding for finding in found if finding.is_news]
        if news:
            raise StepRefused(
                " ".join(f"{one.model} in {one.environment}: {one.message}" for one in news)
            )
        return len(found)


def _roll_back(finding: Finding) -> None:
    """Start the environment's rollback DAG, once for each rollout."""
    from trainyard_airflow.dag_runs import start_run

    start_run(
        f"neuron_rollback__{finding.environment}",
        finding.run_id,
        {
            "model": finding.model,
            "release": finding.release_id,
            # The form takes no longer ones.
            "reason": f"neuron_watch: {finding.message}"[:500],
        },
        note="Started by neuron_watch",
    )
