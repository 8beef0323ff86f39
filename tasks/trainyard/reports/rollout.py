"""The page of one rollout: the evidence over its looks, and what happened."""

from __future__ import annotations

from collections.abc import Sequence

from trainyard.documents.channel import Channel, Rollout
from trainyard.documents.look import Look
from trainyard.reports.charts import evidence_plots, traffic_plot
from trainyard.reports.pages import render


def rollout_report_html(channel: Channel, rollout: Rollout, looks: Sequence[Look]) -> str:
    """Return the page of `rollout` in `channel`.

    Args:
        channel: as it is now; its history gives the events.
        rollout: the one in progress or an earlier one.
        looks: all looks of this rollout, oldest first.
    """
    verdicts = [look.verdict for look in looks if look.verdict]
    return render(
        "rollout.html.j2",
        channel=channel,
        rollout=rollout,
        last=verdicts[-1] if verdicts else rollout.verdict,
        plots=evidence_plots(verdicts),
        traffic=traffic_plot(looks, rollout.release_id),
        events=[entry for entry in channel.history if entry.rollout == rollout.number],
    )
