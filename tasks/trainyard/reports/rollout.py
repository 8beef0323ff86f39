"""The page of one rollout: the evidence over its looks, and what happened."""

from __future__ import annotations

from collections.abc import Sequence

from trainyard.documents.channel import Channel, Rollout
from trainyard.documents.evidence import Verdict
from trainyard.reports.charts import evidence_plots
from trainyard.reports.pages import render


def rollout_report_html(channel: Channel, rollout: Rollout, looks: Sequence[Verdict]) -> str:
    """Return the page of `rollout` in `channel`.

    Args:
        channel: as it is now; its history gives the events.
        rollout: the one in progress or an earlier one.
        looks: every verdict of the judge in this rollout, in any order.
    """
    return render(
        "rollout.html.j2",
        channel=channel,
        rollout=rollout,
        looks=sorted(looks, key=lambda look: look.at),
        plots=evidence_plots(looks),
        events=[entry for entry in channel.history if entry.rollout == rollout.number],
    )
