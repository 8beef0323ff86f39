"""Judges the names of a source's files before anything is fetched.

Names come from whoever uploaded the model. They become keys of the store and files on a node, so
that a name must not leave its folder, and no two may fall together on a disk that ignores case.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from trainyard.errors import BadInput
from trainyard.names import check_relative_path

MAX_NAME_BYTES = 255
"""Of one path component, the limit of file systems."""


def name_problems(paths: Iterable[str]) -> list[str]:
    """Return one sentence for all names that cannot be used, or none."""
    bad = sorted(path for path in paths if not _is_usable(path))
    if not bad:
        return []
    shown = ", ".join(map(ascii, bad[:3])) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    return [
        f"names of files are not plain relative paths ({shown}): rename these files in the source"
    ]


def collision_problems(paths: Iterable[str]) -> list[str]:
    """Return a sentence for each pair of names that differ only in case or in composition."""
    seen: dict[str, str] = {}
    problems = []
    for path in paths:
        other = seen.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
        if other != path:
            problems.append(
                f"{other!a} and {path!a} would be the same file on some disks: rename one of them"
            )
    return problems


def _is_usable(path: str) -> bool:
    try:
        check_relative_path(path)
    except BadInput:
        return False
    return path.isprintable() and all(
        len(part.encode("utf-8", "replace")) <= MAX_NAME_BYTES for part in path.split("/")
    )
