"""The templates, and what every page can use in them."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainyard.gates.words import number
from trainyard.reports.charts import BAR_WIDTH, PLOT_HEIGHT, PLOT_WIDTH, TRAFFIC_HEIGHT, bar


def render(template: str, **values: Any) -> str:
    """Return the page that `template` makes of `values`; all text in them is escaped."""
    return _environment().get_template(template).render(**values)


def compile_templates(folder: str) -> None:
    """Compile all templates below a folder, which their first use would have to."""
    environment = _environment()
    for name in environment.list_templates(filter_func=lambda name: name.startswith(folder)):
        environment.get_template(name)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trainyard.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, moment=_moment, short=_short)
    environment.globals.update(
        bar=bar,
        bar_width=BAR_WIDTH,
        plot_width=PLOT_WIDTH,
        plot_height=PLOT_HEIGHT,
        traffic_height=TRAFFIC_HEIGHT,
    )
    return environment


def _number(value: float | None) -> str:
    """Return `value` as people write it, or a dash for none."""
    return "-" if value is None else number(value)


def _moment(value: datetime) -> str:
    return f"{value:%Y-%m-%d %H:%M:%S} UTC"


def _short(hex_digest: str) -> str:
    """Return the beginning of a digest."""
    return hex_digest[:12]
