"""The four releases of the demonstration, and how each of them must end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MODEL = "adder"
ENVIRONMENT = "production"
RELEASE_DAG = "neuron_release"
PROMOTE_DAG = f"neuron_promote__{ENVIRONMENT}"

Ending = Literal["first stable release", "promoted", "stopped by the accuracy gate", "rolled back"]


@dataclass(frozen=True)
class Act:
    """One release of the demonstration."""

    title: str
    revision: str
    ending: Ending
    """How it must end."""
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def succeeds(self) -> bool:
        """Must its run in Airflow succeed? It does only if the release was promoted."""
        return self.ending in {"first stable release", "promoted"}


ACTS = (
    Act("A first release", "r1", "first stable release"),
    Act("A better one", "r2", "promoted"),
    Act("Worse weights", "r3", "stopped by the accuracy gate"),
    Act(
        "The second one's weights, served one request at a time",
        "r2",
        "rolled back",
        {"max_num_seqs": 1},
    ),
)
