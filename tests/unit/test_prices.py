"""Prices come from the user's file, else from the dated table, else from nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainyard.errors import BadInput, NotFound
from trainyard.prices import AS_OF, USD_PER_HOUR, price_of
from trainyard.settings import Settings


def settings(home: Path, text: str | None = None) -> Settings:
    if text is None:
        return Settings(home=home)
    path = home / "prices.yaml"
    path.write_text(text)
    return Settings(home=home, prices=path)


OWN = """
as_of: 2026-11-01
usd_per_hour:
  local: 0.12
  trn1.32xlarge: 21.5
"""


def test_the_table_says_of_when_it_is(tmp_path: Path) -> None:
    found = price_of("inf2.48xlarge", settings(tmp_path))

    assert found is not None
    assert found.usd_per_hour == USD_PER_HOUR["inf2.48xlarge"]
    assert AS_OF in found.source


def test_this_machine_has_no_price_unless_the_user_gives_one(tmp_path: Path) -> None:
    assert price_of("local", settings(tmp_path)) is None

    found = price_of("local", settings(tmp_path, OWN))

    assert found is not None
    assert (found.usd_per_hour, found.source) == (0.12, "prices.yaml of 2026-11-01")


def test_the_users_price_comes_before_the_tables(tmp_path: Path) -> None:
    own = settings(tmp_path, OWN)

    replaced, kept = price_of("trn1.32xlarge", own), price_of("trn1.2xlarge", own)

    assert replaced is not None
    assert kept is not None
    assert replaced.usd_per_hour == 21.5
    assert kept.usd_per_hour == USD_PER_HOUR["trn1.2xlarge"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("usd_per_hour: {local: 1}", "'as_of' is missing"),
        ("as_of: today\nusd_per_hour: {local: -1}", "prices.yaml:2 usd_per_hour.local: -1 is out"),
        ("as_of: today\nusd_per_hour: {local: cheap}", "is not a number"),
        ("as_of: today\nusd_per_hour: {A B: 1}", "instance type"),
        ("as_of: today\nprices: {}", "There is no key 'prices' here."),
        ("a: &b 1", "prices.yaml:1:"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadInput, match=r"prices of TRAINYARD_PRICES") as caught:
        price_of("local", settings(tmp_path, text))

    assert words in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises((BadInput, NotFound), match=r"none\.yaml"):
        price_of("local", Settings(home=tmp_path, prices=tmp_path / "none.yaml"))
