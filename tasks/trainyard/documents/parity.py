"""What parity of the served graph is measured with: references, answers, and the figures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainyard.canonical import digest
from trainyard.documents.base import Document, Frozen

REFERENCE_TOKENS = 10
"""Tokens whose log-probs a reference keeps at each position, the most likely ones."""

SHOWN_DIVERGENCES = 20
"""Divergences that a measurement names one by one; all are counted."""


class ReferenceSettings(Frozen):
    """What a reference depends on besides the checkpoint."""

    dtype: Literal["float32", "bfloat16"]
    """Number format of the reference's forward pass."""
    served_dtype: str
    """Number format of the served model, whose own rounding the reference also measures."""
    prompts_digest: str
    """Of the prompts in their order."""
    max_tokens: int
    """Longest answer."""


class ReferencePosition(Frozen):
    """What the reference says about one token of an answer, given all before it."""

    tokens: tuple[int, ...]
    """Token ids, the most likely first."""
    logprobs: tuple[float, ...]
    """Their natural logarithms of probability."""
    rounded: tuple[float, ...] = ()
    """The same of a pass in the served number format: what rounding alone does."""

    @property
    def gap(self) -> float:
        """How much more likely the best token is than the next, in nats."""
        return self.logprobs[0] - self.logprobs[1] if len(self.logprobs) > 1 else float("inf")


class ReferenceAnswer(Frozen):
    """The reference's greedy answer to one prompt."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    positions: tuple[ReferencePosition, ...]
    """One for each token of the answer."""


class Reference(Document):
    """`references/<checkpoint digest>/<digest of the settings>.json`."""

    checkpoint_digest: str
    settings: ReferenceSettings
    answers: tuple[ReferenceAnswer, ...]
    """In the order of the prompts."""
    made_with: dict[str, str] = Field(default_factory=dict)
    """Versions of the packages that computed it."""
    seconds: float = 0.0
    """How long that took."""


def reference_digest(settings: ReferenceSettings) -> str:
    """Return the digest that a reference is stored by, beside its checkpoint's."""
    return digest(settings.model_dump(mode="json"))


class ServedAnswer(Frozen):
    """What the server answered to one prompt, greedily."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    top: tuple[dict[int, float], ...] = ()
    """For each token the log-probs of the most likely ones by id; empty: the lane gives none."""


class Divergence(Frozen):
    """A token that the reference would not have chosen."""

    prompt: int
    """Counts from 0."""
    position: int
    """In the answer; counts from 1."""
    served: int | None
    """Token id; None: the answer ended."""
    expected: int | None
    """Token id; None: the answer should have ended, or began with another prompt."""
    gap: float | None
    """Nats between the reference's two best tokens; None: unknown."""


class PositionCounts(Frozen):
    """One position of all answers."""

    compared: int
    agreed: int
    excused: int


class ParityFigures(Frozen):
    """Greedy answers of the server against the reference."""

    reference: str
    """Key of the reference."""
    reference_reused: bool = False
    prompts: int
    prompt_agreement: float
    """Share of prompts that the server cut into the same tokens."""
    compared: int
    """Positions that were compared."""
    agreed: int
    excused: int
    """Positions where the two best tokens of the reference are so close that either is right."""
    uncompared: int = 0
    """Positions after a divergence that an imported reference says nothing about."""
    first_divergence: int
    """Tokens before the first divergence that is not excused, in the worst answer; if there is
    none, the longest answer's."""
    exact_answers: float
    """Share of answers that are the reference's, token by token."""
    top_logprobs: int = 0
    """Tokens whose log-probs the lane returns at each position; 0: none."""
    logprob_error: float | None = None
    """Root mean square of the differences of log-probs, in nats."""
    rounding_error: float | None = None
    """The same of a pass in the served number format on the same tokens."""
    by_position: tuple[PositionCounts, ...]
    divergences: tuple[Divergence, ...] = ()
    """The first ones."""

    @property
    def agreement(self) -> float | None:
        """Share of compared positions that agree or are excused."""
        return (self.agreed + self.excused) / self.compared if self.compared else None

    @property
    def excused_share(self) -> float | None:
        """Share of all positions that are excused or could not be compared."""
        every = self.compared + self.uncompared
        return (self.excused + self.uncompared) / every if every else None

    @property
    def error_ratio(self) -> float | None:
        """The error in units of what the served number format's rounding explains."""
        if self.logprob_error is None or not self.rounding_error:
            return None
        return self.logprob_error / self.rounding_error


class TaskSamples(Frozen):
    """The scores of one task's samples."""

    name: str
    metric: str
    scores: dict[str, float]
    """By sample: its number, and digests of its prompt and target, so that only equal ones pair."""


class AnswerFigures(Frozen):
    """Parity of one answer."""

    tokens: tuple[int, ...]
    """As they were served."""
    agreed: int
    excused: int
    diverged: int


class Samples(Document):
    """`samples/<measurement id>/<digest>.json`: what the figures of a measurement are made of."""

    measurement_id: str
    tasks: tuple[TaskSamples, ...] = ()
    answers: tuple[AnswerFigures, ...] = ()
    """Of the parity check, in the order of its prompts."""
