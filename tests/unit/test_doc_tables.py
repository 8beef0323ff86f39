"""The pages of metrics and settings have the tables that the code makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.unit.doc_tables import DOCS, tables, written

from trainyard.settings import Settings

TABLES = tables()
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", TABLES)
def test_the_tables_are_what_the_code_makes(page: str) -> None:
    text = (DOCS / page).read_text()

    assert written(text, TABLES[page]) == text, "python -m tests.unit.doc_tables"


def test_every_setting_is_explained_there_and_no_secret_is_shown() -> None:
    (table,) = TABLES["settings.md"].values()
    for name, field in Settings.model_fields.items():
        (row,) = (line for line in table.splitlines() if f"`TRAINYARD_{name.upper()}`" in line)
        assert field.description
        assert row.count("|") == 5


@pytest.mark.parametrize(
    "page", ["first-release.md", "operations.md", "faq.md", "monitoring.md", "settings.md"]
)
def test_every_link_leads_somewhere(page: str) -> None:
    text = (DOCS / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = DOCS / (name or page)
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
