"""Reads Dockerfiles, as far as ours go: instructions, continued lines, comments between them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction with everything behind its name."""

    name: str
    value: str

    @property
    def words(self) -> list[str]:
        return self.value.split()


KNOWN = {
    "ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "HEALTHCHECK", "USER", "ENTRYPOINT", "CMD",
}  # fmt: skip


def parse(path: Path) -> list[Instruction]:
    """Return the instructions of a file; what the parser does not know fails."""
    found: list[Instruction] = []
    lines = [line for line in path.read_text().splitlines() if not re.match(r"\s*(#|$)", line)]
    text = re.sub(r"\\\n", "", "\n".join(lines))
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        assert name in KNOWN, f"{path.name}: {line}"
        assert "<<" not in value or name == "RUN", f"{path.name}: no here-documents"
        found.append(Instruction(name, value.strip()))
    return found


def arguments(value: str) -> list[str]:
    """Return the words of an instruction in JSON form. Raises ValueError for the shell form."""
    loaded = json.loads(value)
    assert isinstance(loaded, list)
    return [str(each) for each in loaded]
