"""Which files of a source count: the spec's `allow_patterns` and `ignore_patterns`.

They mean what they mean to huggingface_hub: shell wildcards over the whole path, in which `*` also
matches `/`, and a pattern that ends with `/` stands for everything below that folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Tell whether `path` matches one of `patterns`."""
    return any(fnmatchcase(path, f"{p}*" if p.endswith("/") else p) for p in patterns)


def selected(path: str, *, allow: Sequence[str], ignore: Sequence[str]) -> bool:
    """Tell whether the file at `path` counts."""
    return (not allow or matches(path, allow)) and not matches(path, ignore)
