"""What a test says after each closed block."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class EvidencePath:
    """Evidence and thresholds after each closed block, all of one length (that of the blocks).

    Evidence and threshold of one block share a scale (a z score, or the log of an e-value). That
    scale may change from block to block, so evidence is only ever compared with its threshold.
    """

    harm: Floats
    harm_threshold: Floats
    promote: Floats
    promote_threshold: Floats
    first_harm_block: int = 0
    """Harm before this block does not count."""
    held: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    """Blocks after which a guard holds: neither answer counts there. Empty: none does."""

    def first_harm(self) -> int | None:
        """Return the block at which harm was first shown, if it was."""
        shown = self.harm >= self.harm_threshold
        shown[: self.first_harm_block] = False
        if self.held.size:
            shown &= ~self.held
        return int(shown.argmax()) if shown.any() else None

    def is_non_inferior(self) -> NDArray[np.bool_]:
        """Return after which blocks the candidate counts as inside the promotion margin."""
        proven = self.promote >= self.promote_threshold
        return np.asarray(proven & ~self.held if self.held.size else proven)

    def is_held(self) -> bool:
        """Tell whether a guard holds after the newest block."""
        return bool(self.held.size and self.held[-1])


def further(one: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """Return, block by block, that pair of (evidence, threshold) which is nearer to its threshold.

    Thresholds are positive; an infinite one says that its test does not apply at that block.
    """
    nearer = one[0] / one[1] >= other[0] / other[1]
    nearer &= np.isfinite(one[1])
    return np.where(nearer, one[0], other[0]), np.where(nearer, one[1], other[1])
