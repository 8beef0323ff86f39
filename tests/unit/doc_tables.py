"""Writes what the docs show of the code: python -m tests.unit.doc_tables.

These are the tables of docs/monitoring.md and docs/settings.md, and the diagram of docs/rollout.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from tests.unit.rollout.drawn import mermaid

from trainyard.metrics.families import FAMILIES
from trainyard.serving.kubernetes.guard_metrics import GuardMetrics
from trainyard.serving.proxy_metrics import ProxyMetrics
from trainyard.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"
BEGIN = "<!-- {name}: python -m tests.unit.doc_tables -->\n"
END = "<!-- end of {name} -->\n"


def tables() -> dict[str, dict[str, str]]:
    """Return the tables by page and name."""
    return {
        "monitoring.md": {
            "exporter": _metrics_table(_of_exporter()),
            "proxy": _metrics_table(_of_pages(ProxyMetrics().text([]).decode(), ProxyMetrics())),
            "guard": _metrics_table(_of_pages(GuardMetrics().text().decode(), GuardMetrics())),
        },
        "settings.md": {"settings": _settings_table()},
        "rollout.md": {"states": mermaid()},
    }


def written(page: str, parts: dict[str, str]) -> str:
    """Return a page with its tables made anew."""
    for name, table in parts.items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        before, rest = page.split(begin)
        page = f"{before}{begin}{table}{end}{rest.split(end)[1]}"
    return page


def _metrics_table(rows: Iterator[tuple[str, str, tuple[str, ...], str]]) -> str:
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for name, kind, labels, meaning in rows:
        marked = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{name}` | {kind} | {marked} | {meaning} |")
    return "\n".join([*lines, ""])


def _of_exporter() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    for family in FAMILIES.values():
        yield family.name, "gauge", family.labels, family.help


def _of_pages(text: str, owner: Any) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Yield what a registry holds, also without samples; labels are asked of the metrics."""
    labels = {
        collector._name: tuple(collector._labelnames)
        for collector in owner._registry._collector_to_names
    }
    for family in text_string_to_metric_families(text):
        suffix = "_total" if family.type == "counter" else ""
        if family.name in labels:
            yield (
                f"{family.name}{suffix}",
                family.type,
                labels[family.name],
                family.documentation,
            )


def _settings_table() -> str:
    lines = ["| variable | kind | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        meaning = re.sub(r"\s+", " ", field.description or "").replace("|", "\\|")
        kind, default = _kind(field.annotation), _default(field)
        lines.append(f"| `TRAINYARD_{name.upper()}` | {kind} | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if isinstance(annotation, UnionType):
        return _kind(next(each for each in get_args(annotation) if each is not type(None)))
    names = {bool: "yes or no", int: "whole number", float: "number", str: "text",
             Path: "path", SecretStr: "secret"}  # fmt: skip
    return names.get(annotation, getattr(annotation, "__name__", "text"))


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        # Below the folder that the process starts in.
        value = field.get_default(call_default_factory=True, validated_data={})
        return f"`{Path(value).relative_to(Path.cwd())}` here"
    value = field.default
    if isinstance(value, SecretStr):
        return "none"
    return "none" if value in ("", None) else f"`{value}`"


if __name__ == "__main__":
    for page, parts in tables().items():
        path = DOCS / page
        path.write_text(written(path.read_text(encoding="utf-8"), parts), encoding="utf-8")
