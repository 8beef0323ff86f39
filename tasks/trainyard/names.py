"""The one place where names from outside become file names, document keys and Kubernetes names."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from trainyard.errors import BadInput

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
"""Names of models, targets and environments: DNS labels with room for suffixes."""

REVISION_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?$"
"""Revisions: commit hashes, tags and folder names, without path separators."""

RELEASE_ID_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?-[0-9a-f]{12}$"


def check_name(value: str, what: str) -> str:
    """Return `value` if it is a valid model, target or environment name.

    Raises:
        BadInput: it is not; the message names `what` and the rule.
    """
    if not re.fullmatch(NAME_PATTERN, value):
        raise BadInput(
            f"{what} {value!r} is not a valid name.",
            hint="Use 1 to 40 lower-case letters, digits and hyphens, starting and ending with "
            "a letter or digit.",
        )
    return value


def check_revision(value: str) -> str:
    """Return `value` if it can be a revision.

    Raises:
        BadInput: it is empty, too long or holds a path separator.
    """
    if not re.fullmatch(REVISION_PATTERN, value) or ".." in value:
        raise BadInput(
            f"Revision {value!r} is not valid.",
            hint="Use 1 to 100 letters, digits, dots, hyphens and underscores (no '/', no '..').",
        )
    return value


def check_release_id(value: str) -> str:
    """Return `value` if it has the form of a release id (`<model>-<12 hex digits>`).

    Raises:
        BadInput: it has not.
    """
    if not re.fullmatch(RELEASE_ID_PATTERN, value):
        raise BadInput(
            f"Release {value!r} is not a release id.",
            hint="A release id is the model's name, a hyphen and 12 hex digits, "
            "as `trainyard releases` prints it.",
        )
    return value


def check_relative_path(value: str) -> str:
    """Return `value` if it is a relative POSIX path that stays inside its folder.

    Raises:
        BadInput: it is absolute, empty, holds a backslash, a NUL, or a `.` or `..` component.
    """
    path = PurePosixPath(value)
    parts = value.split("/")
    if (
        not value
        or path.is_absolute()
        or "\\" in value
        or "\x00" in value
        or any(part in {"", ".", ".."} for part in parts)
    ):
        raise BadInput(
            f"Path {value!r} would leave its folder.",
            hint="Files of a checkpoint or bundle have plain relative names.",
        )
    return value
