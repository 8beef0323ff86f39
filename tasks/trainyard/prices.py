"""What an hour of an instance costs: a dated table, and a file of the user's own that replaces it.

A price is frozen with a plan, so that a verdict about cost can be derived again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError

from trainyard.documents.plan import Price
from trainyard.errors import BadInput
from trainyard.settings import Settings
from trainyard.spec.model import INSTANCE_PATTERN
from trainyard.spec.part import SpecPart
from trainyard.spec.sentences import say
from trainyard.spec.yaml_source import read_yaml

AS_OF = "2024-04"
"""When the prices of `USD_PER_HOUR` were published, with Neuron SDK 2.18."""

USD_PER_HOUR: Mapping[str, float] = {
    "inf2.xlarge": 0.328,
    "inf2.8xlarge": 0.850,
    "inf2.24xlarge": 2.804,
    "inf2.48xlarge": 5.608,
    "trn1.2xlarge": 0.512,
    "trn1.32xlarge": 8.197,
}
"""Reserved instances, as AWS's own benchmark tables of the Neuron SDK state them. On demand costs
about 2.3 to 2.6 times as much, and Trn2 and Trn3 have no price there: both are what the file of
`TRAINYARD_PRICES` is for."""

_SOURCE = f"reserved, AWS's Neuron benchmark tables of {AS_OF}"


class PriceFile(SpecPart):
    """The file that `TRAINYARD_PRICES` names."""

    as_of: str = Field(min_length=1)
    """When the prices were looked up, such as `2026-11-01`; for people."""
    usd_per_hour: dict[
        Annotated[str, StringConstraints(pattern=INSTANCE_PATTERN)],
        Annotated[float, Field(gt=0, allow_inf_nan=False)],
    ]
    """Dollars an hour by instance, as `instance` of a target names it; `local` is this machine."""


def price_of(instance: str, settings: Settings) -> Price | None:
    """Return what an hour of `instance` costs; None if nobody said.

    The user's file comes first; what it does not name has the price of the dated table.

    Raises:
        BadInput: the user's file cannot be read, or is wrong.
    """
    if settings.prices is not None:
        own = read_prices(settings.prices)
        if instance in own.usd_per_hour:
            source = f"{settings.prices.name} of {own.as_of}"
            return Price(instance=instance, usd_per_hour=own.usd_per_hour[instance], source=source)
    if instance not in USD_PER_HOUR:
        return None
    return Price(instance=instance, usd_per_hour=USD_PER_HOUR[instance], source=_SOURCE)


def read_prices(path: Path) -> PriceFile:
    """Return the prices in a file. Raises BadInput with everything that is wrong."""
    source = read_yaml(path)
    problems = [
        f"{path.name}:{flaw.position.line}: {flaw.message} {flaw.remedy}" for flaw in source.flaws
    ]
    if not problems:
        try:
            return PriceFile.model_validate_json(json.dumps(source.data), strict=True)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                location, message, remedy = say(detail, PriceFile)
                line = source.position(location).line
                name = ".".join(str(step) for step in location)
                problems.append(f"{path.name}:{line} {name}: {message} {remedy}")
    raise BadInput(
        "The prices of TRAINYARD_PRICES cannot be used: " + " ".join(problems),
        hint="docs/gates-latency.md has an example.",
    )
