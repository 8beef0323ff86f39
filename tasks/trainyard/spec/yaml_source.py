"""YAML with the line and column of every key, and none of YAML's surprises.

Files that people write are read as YAML 1.2 with JSON's types: `no` and `on` are text, a date is
text, `0123` is text. What could be read in two ways or could blow up is refused: duplicate keys,
anchors and aliases, tags, several documents, deep nesting, huge files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from trainyard.errors import BadInput, NotFound

MAX_BYTES = 256 * 1024
"""Far above any spec, and read in about a second."""
MAX_DEPTH = 32
"""Levels of nesting; a spec has fewer than ten."""

Location = tuple[str | int, ...]
"""The way to a value: keys and, in lists, indices from 0."""

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]{1,4})?|[-+]?[0-9]+[eE][-+]?[0-9]+"
)
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True, order=True)
class Position:
    """A place in a file; both count from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Flaw:
    """Something that the YAML itself gets wrong."""

    location: Location
    position: Position
    message: str
    """What is wrong, one sentence."""
    remedy: str
    """What would be right, one sentence."""
    spoils: bool = True
    """Is there no value at the location that could be looked at further?"""


@dataclass(frozen=True)
class YamlFile:
    """What a YAML file says, and where."""

    path: Path
    data: dict[str, Any] | None
    """Mappings, lists, text, numbers, booleans and None; None if there is no mapping at all."""
    positions: Mapping[Location, Position]
    """Of the key where the value belongs to a key, of the item where it belongs to a list."""
    flaws: tuple[Flaw, ...]
    """Empty if the file can be trusted."""

    def position(self, location: Location) -> Position:
        """Return the place of `location`, or of the nearest thing around it that exists."""
        for length in range(len(location), 0, -1):
            found = self.positions.get(location[:length])
            if found is not None:
                return found
        return Position(1, 1)


def read_yaml(path: Path, *, quick: bool = False) -> YamlFile:
    """Read a YAML file; what is wrong inside it is in the result's `flaws`.

    Args:
        path: of the file.
        quick: as of `parse_yaml`.

    Raises:
        NotFound: there is no such file.
        BadInput: it cannot be read, or is larger than `MAX_BYTES`.
    """
    return parse_yaml(read_bytes(path), path, quick=quick)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file that somebody wrote. Raises as `read_yaml`."""
    try:
        with path.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFound(f"There is no file {path}.", hint="Check the path.") from error
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read: {error.strerror}.", hint="Give the path of a readable file."
        ) from error
    if len(raw) > MAX_BYTES:
        raise BadInput(
            f"{path} is larger than {MAX_BYTES // 1024} KiB.",
            hint="A spec is a few kilobytes; keep data in files beside it.",
        )
    return raw


def parse_yaml(raw: bytes, path: Path, *, quick: bool = False) -> YamlFile:
    """Parse the content of a YAML file.

    Args:
        raw: the content.
        path: for messages only.
        quick: use the parser in C if there is one: 20 times as fast, with less said about mistakes.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8", errors="replace")
        place = Position(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
        flaw = Flaw((), place, "The file is not UTF-8 text.", "Save it as UTF-8.")
        return YamlFile(path, None, {}, (flaw,))
    builder = _Builder(text, _QUICK if quick else yaml.SafeLoader)
    data: dict[str, Any] | None = None
    try:
        data = builder.build()
    except _Stop:
        data = None
    except yaml.YAMLError as error:
        builder.flaws.append(_syntax_flaw(error, text))
    return YamlFile(path, data, builder.positions, tuple(builder.flaws))


_QUICK = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Stop(Exception):
    """The rest of the file cannot be given a meaning; the flaw is noted."""


class _Builder:
    """Builds the values of one document from the parser's events.

    Events, not nodes: they tell an alias from its anchor and a tag that was written from one that
    was guessed, and nothing is expanded or recursed into before it is known to be small.
    """

    def __init__(self, text: str, loader: Any) -> None:
        self.events: Iterator[yaml.Event] = yaml.parse(text, Loader=loader)
        self.positions: dict[Location, Position] = {}
        self.flaws: list[Flaw] = []

    def build(self) -> dict[str, Any] | None:
        next(self.events)  # the stream's start
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            self._flaw((), event, "The file is empty.", "Write a mapping of keys and values.")
            return None
        first = next(self.events)
        value = self._value(first, ())
        next(self.events)  # the document's end
        following = next(self.events)
        if not isinstance(following, yaml.StreamEndEvent):
            self._flaw(
                (),
                following,
                "A second document starts here.",
                "Keep one document in a file; remove the `---` line.",
            )
        if isinstance(value, dict):
            return value
        self._flaw(
            (),
            first,
            f"The file holds {_kind(value)} where a mapping belongs.",
            "Write keys and values, `key: value` a line.",
        )
        return None

    def _value(self, event: yaml.Event, at: Location) -> Any:
        if len(at) > MAX_DEPTH:
            self._flaw(
                at,
                event,
                f"The nesting is deeper than {MAX_DEPTH} levels.",
                "Remove the superfluous brackets or indentation.",
            )
            raise _Stop
        if isinstance(event, yaml.AliasEvent):
            self._flaw(
                at,
                event,
                f"`*{event.anchor}` repeats another value.",
                "Write the value out; anchors and aliases are not allowed.",
            )
            return None
        self._refuse_extras(event, at)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(at)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(at)
        return self._scalar(cast(yaml.ScalarEvent, event), at)

    def _refuse_extras(self, event: yaml.Event, at: Location) -> None:
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self._flaw(
                at,
                event,
                f"`&{anchor}` names a value.",
                "Remove the anchor; anchors and aliases are not allowed.",
                spoils=False,
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            self._flaw(
                at, event, f"`{shown}` is a tag.", "Remove it; values have their plain types here."
            )

    def _mapping(self, at: Location) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self._flaw(
                    at,
                    event,
                    "A key is not plain text here.",
                    "Write `key: value` with a plain key.",
                )
                raise _Stop
            self._refuse_extras(event, at)
            key = self._text(event, at)
            place = (*at, key)
            if key in result:
                first = self.positions[place].line
                self._flaw(
                    place,
                    event,
                    f"The key {key!r} is there twice; the first is in line {first}.",
                    "Keep one of the two.",
                    spoils=False,
                )
                self._skip()
                continue
            self.positions[place] = _position(event)
            result[key] = self._value(next(self.events), place)
        return result

    def _skip(self) -> None:
        """Pass over one value."""
        depth = 0
        while True:
            event = next(self.events)
            if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                depth += 1
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                depth -= 1
            if depth == 0:
                return

    def _sequence(self, at: Location) -> list[Any]:
        result: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            place = (*at, len(result))
            self.positions[place] = _position(event)
            result.append(self._value(event, place))
        return result

    def _scalar(self, event: yaml.ScalarEvent, at: Location) -> Any:
        text = self._text(event, at)
        if not event.implicit[0]:  # quoted, or a block of text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
            return number
        if _NOT_FINITE.fullmatch(text) or _FLOAT.fullmatch(text):
            self._flaw(
                at, event, f"{text} is not a finite number.", "Write an ordinary decimal number."
            )
            return None
        return text

    def _text(self, event: yaml.ScalarEvent, at: Location) -> str:
        """Return the text of a scalar; JSON writes one character as two escapes at times."""
        text = str(event.value)
        try:
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            self._flaw(
                at,
                event,
                "An escape such as \\ud800 stands for half a character.",
                "Write the character itself.",
            )
            return text.encode("utf-8", "replace").decode()

    def _flaw(
        self,
        location: Location,
        event: yaml.Event,
        message: str,
        remedy: str,
        *,
        spoils: bool = True,
    ) -> None:
        self.flaws.append(Flaw(location, _position(event), message, remedy, spoils))


def _position(event: yaml.Event) -> Position:
    mark = cast(yaml.Mark, event.start_mark)  # the parser always sets it
    return Position(mark.line + 1, mark.column + 1)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else "a single value"


def _syntax_flaw(error: yaml.YAMLError, text: str) -> Flaw:
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        place = Position(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
        return Flaw(
            (),
            place,
            f"There is a control character (code {ord(text[error.position])}) in the text.",
            "Remove it.",
        )
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)
    said = getattr(error, "problem", None) or "it cannot be read"
    return Flaw(
        (),
        place,
        f"This is not valid YAML: {said}.",
        "Check the indentation, quotes and colons of this line and the one above.",
    )
