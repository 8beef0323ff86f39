"""Prints the part of a lock that the project and some of its extras need.

    python3 select_lock.py requirements/airflow.txt pyproject.toml airflow

The lock of Airflow's environment also has what only developers need. Each package in it says which
others want it (`# via`); what nobody wants any more without the other extras is left out. Needs
nothing but Python, so that an image can be built with it.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(\[[^\]]*\])?==")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*")


def normal(name: str) -> str:
    """Return a package's name as all spellings of it have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def split(lock: str) -> dict[str, str]:
    """Return the entry of each package of a lock."""
    entries: dict[str, str] = {}
    name = ""
    for line in lock.splitlines(keepends=True):
        found = _PACKAGE.match(line)
        if found:
            name = normal(found[1])
            entries[name] = ""
        if name:
            entries[name] += line
    return entries


def wanted_by(entry: str, project: str) -> set[str]:
    """Return the names of those that want a package; empty for the project itself."""
    comments = re.findall(r"^    #\s+(?:via\s+)?(\S+)(?: \(.*\))?$", entry, re.MULTILINE)
    names = {normal(re.sub(r"\[.*", "", each)) for each in comments if each != "via"}
    return {"" if name == normal(project) else name for name in names}


def roots(pyproject: str, extras: Iterable[str]) -> tuple[str, set[str]]:
    """Return the project's name, and those of the packages that it and `extras` name."""
    project = tomllib.loads(pyproject)["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    named = (_NAME.match(line) for line in lines)
    return project["name"], {normal(found[0]) for found in named if found}


def select(lock: str, pyproject: str, extras: Iterable[str]) -> str:
    """Return the part of `lock` that the project with `extras` needs."""
    entries = split(lock)
    project, named = roots(pyproject, extras)
    wanted = {name: wanted_by(entry, project) for name, entry in entries.items()}
    chosen = {name for name in named if name in entries}
    missing = named - chosen
    if missing:
        raise SystemExit(f"The lock has no {', '.join(sorted(missing))}: run `make lock`.")
    while True:
        more = {name for name, by in wanted.items() if name not in chosen and by & chosen}
        if not more:
            return "".join(entry for name, entry in entries.items() if name in chosen)
        chosen |= more


def main() -> None:
    """Print what the arguments ask for."""
    lock, pyproject, *extras = sys.argv[1:]
    print(select(Path(lock).read_text(), Path(pyproject).read_text(), extras), end="")


if __name__ == "__main__":
    main()
