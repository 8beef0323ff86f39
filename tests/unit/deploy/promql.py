"""Finds the names of metrics in PromQL, as far as our own expressions go."""

from __future__ import annotations

import re

_NAMES = re.compile(r'__name__=~"([^"]+)"')
_LABEL_LISTS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_WORDS = re.compile(r"(?<![\w.:$])([a-zA-Z_:][\w:]*)(?!\s*\(|[\w:])")
_OPERATORS = frozenset({"and", "or", "unless", "bool", "offset", "by", "on", "inf", "nan"})


def metric_names(expression: str) -> set[str]:
    """Return the metrics that an expression reads, histograms' series by their full names."""
    found = {name for names in _NAMES.findall(expression) for name in names.split("|")}
    text = re.sub(r'"[^"]*"', "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", text)
    text = _LABEL_LISTS.sub("", text)
    return found | {word for word in _WORDS.findall(text) if word.lower() not in _OPERATORS}
