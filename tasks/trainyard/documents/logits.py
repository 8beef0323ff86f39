"""What AWS's logit validation says of a checkpoint on a device, apart from any server."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from trainyard.canonical import digest, short
from trainyard.documents.base import Document, Frozen
from trainyard.spec.model import LogitValidation

NOT_SERVED: Literal["not the served graph"] = "not the served graph"

SIGMA_RATIO = "agg_sigma_ratio"
SIMILARITY = "agg_bc"
"""Names of AWS's aggregates (`vllm_neuron.accuracy.logit_validation`)."""


class LogitFigures(Frozen):
    """What AWS's tool found."""

    passed: bool
    """Its own word."""
    prompts: tuple[bool, ...]
    """For each prompt: are its logits within the fixed tolerances?"""
    metrics: dict[str, float | bool | str] = Field(default_factory=dict)
    """Its aggregates over all prompts, as far as they are single values."""
    made_with: dict[str, str]
    """Versions of the packages that took part."""
    seconds: float

    @property
    def within(self) -> bool:
        """AWS's rule: one of three ways is enough.

        All prompts are within the fixed tolerances; or the errors spread no more than those of
        bfloat16 on the CPU; or their distributions are alike.
        """
        sigma = self.metrics.get(SIGMA_RATIO)
        steady = isinstance(sigma, float) and not isinstance(sigma, bool) and sigma <= 1.0
        similar = self.metrics.get(SIMILARITY) in ("PASS", True)
        return self.passed or steady or similar


class LogitReport(Document):
    """`samples/<measurement id>/logits-<digest>.json`: shown beside a release, judged by nobody."""

    measurement_id: str
    model: str
    revision: str
    checkpoint_digest: str
    target: str
    settings: LogitValidation
    label: Literal["not the served graph"] = NOT_SERVED
    """The tool compiles the model anew, with graphs that return logits."""
    figures: LogitFigures
    machine: dict[str, Any]


def logits_digest(settings: LogitValidation) -> str:
    """Return what tells validations of one measurement apart: all that changes their figures."""
    return short(digest(settings.model_dump(mode="json", exclude={"severity"})))
