"""What lm-evaluation-harness says of its own tasks where they will be measured."""

from __future__ import annotations

from trainyard.documents.base import Document


class HarnessReport(Document):
    """`samples/<measurement id>/tasks.json`: the harness of the image knows the tasks of a spec,
    with their data sets, and the target can answer them.
    """

    measurement_id: str
    image: str
    """Of the pod that was asked; empty: an environment on a machine."""
    tasks: dict[str, tuple[str, ...]]
    """For each task, the kinds of answers that it wants (`output_type`)."""
