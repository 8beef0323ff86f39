"""YAML as it is written, with positions, and refusals of what has two meanings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.spec.yaml_source import Position, YamlFile, parse_yaml

HERE = Path("some.yaml")


def parse(text: str) -> YamlFile:
    return parse_yaml(text.encode(), HERE)


def test_every_key_and_item_has_its_place() -> None:
    found = parse("a: 1\nb:\n  - x\n  - c: {d: 2}\n")

    assert found.data == {"a": 1, "b": ["x", {"c": {"d": 2}}]}
    assert found.flaws == ()
    assert found.position(("a",)) == Position(1, 1)
    assert found.position(("b", 0)) == Position(3, 5)
    assert found.position(("b", 1, "c", "d")) == Position(4, 9)
    assert found.position(("b", 1, "c", "missing")) == found.position(("b", 1, "c"))
    assert found.position(("nowhere",)) == Position(1, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("12", 12),
        ("-3", -3),
        ("0123", "0123"),
        ("0x10", "0x10"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("9" * 40, "9" * 40),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("2026-01-01", "2026-01-01"),
        ("'12'", "12"),
        ('"true"', "true"),
        ("''", ""),
        ("|\n    two\n    lines", "two\nlines\n"),
    ],
)
def test_scalars_have_the_types_of_json(text: str, value: Any) -> None:
    found = parse(f"a: {text}\n")

    assert found.flaws == ()
    assert found.data is not None
    assert found.data["a"] == value
    assert type(found.data["a"]) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "twice; the first is in line 1"),
        ("a: &x [1]\nb: *x\n", 1, "&x"),
        ("a: &x [1]\nb: *x\n", 2, "*x"),
        ("a: 1\nb: !!python/object:os.system {}\n", 2, "is a tag"),
        ("a: !function utils.f\n", 1, "is a tag"),
        ("a: .inf\n", 1, "not a finite number"),
        ("a: 1.0e9999\n", 1, "not a finite number"),
        ("a: .NaN\n", 1, "not a finite number"),
        ('a: "\\ud800"\n', 1, "half a character"),
    ],
)
def test_what_has_two_meanings_is_refused(text: str, line: int, words: str) -> None:
    flaws = parse(text).flaws

    assert any(flaw.position.line == line and words in flaw.message for flaw in flaws)
    assert all(flaw.remedy for flaw in flaws)


def test_a_bomb_of_aliases_is_not_expanded() -> None:
    levels = ["a0: &a0 [x, x]"]
    levels += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]

    found = parse("\n".join(levels))

    assert len(json.dumps(found.data)) < 10_000
    assert len(found.flaws) == 60 + 2 * 59


def test_the_first_of_two_equal_keys_counts_and_the_rest_is_read() -> None:
    found = parse("a: {b: 1}\na: {c: [1, {d: 2}]}\ne: 5\n")

    assert found.data == {"a": {"b": 1}, "e": 5}
    assert len(found.flaws) == 1
    assert ("a", "c") not in found.positions


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=5))
def test_json_is_read_as_json(data: dict[str, Any]) -> None:
    found = parse(json.dumps(data))

    assert found.flaws == ()
    assert found.data == data


@given(st.text(max_size=60))
def test_any_text_is_answered_with_data_or_flaws(text: str) -> None:
    found = parse_yaml(text.encode("utf-8", "surrogatepass"), HERE)

    assert found.data is not None or found.flaws
