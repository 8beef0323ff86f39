"""Names of files that come from strangers."""

from __future__ import annotations

import pytest

from trainyard.sources.names import collision_problems, name_problems


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "..",
        "../a",
        "a/..",
        "a/../b",
        "./a",
        "a//b",
        "a/",
        "a\\b",
        "C:\\x",
        "a\x00b",
        "a\nb",
        "a\x1b[31m",
        "a\u202eb",
        "x" * 256,
        "é" * 128,
    ],
)
def test_what_is_no_name(name: str) -> None:
    (problem,) = name_problems(["config.json", name])
    assert "config.json" not in problem
    assert problem.isprintable()


def test_plain_names_are_fine() -> None:
    assert name_problems(["config.json", "a/b/c.txt", "modèle.json", "x y.txt", "é" * 127]) == []


def test_many_bad_names_are_one_sentence() -> None:
    (problem,) = name_problems([f"../{n}" for n in range(9)])
    assert "and 6 more" in problem


@pytest.mark.parametrize(
    ("one", "other"),
    [("a.json", "A.json"), ("stra\u00dfe", "STRASSE"), ("\u00e9.txt", "e\u0301.txt")],
)
def test_names_that_fall_together(one: str, other: str) -> None:
    (problem,) = collision_problems([one, "b", other])
    assert "the same file" in problem


def test_names_that_do_not() -> None:
    assert collision_problems(["a.json", "b.json", "a.txt"]) == []
