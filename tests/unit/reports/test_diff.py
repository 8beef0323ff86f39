"""Two documents field by field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.reports.diff import Difference, differences

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("xyz", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text("abc", min_size=1, max_size=2), JSON, max_size=4)


def test_fields_are_named_by_their_path() -> None:
    before = {"target": {"name": "cpu", "sizes": [1, 2]}, "gone": "x", "same": {"a": 1}}
    after = {"target": {"name": "trn", "sizes": [1, 4, 8]}, "new": None, "same": {"a": 1}}
    assert differences(before, after) == (
        Difference("gone", "x", "", "removed"),
        Difference("new", "", "null", "added"),
        Difference("target.name", "cpu", "trn", "changed"),
        Difference("target.sizes[1]", "2", "4", "changed"),
        Difference("target.sizes[2]", "", "8", "added"),
    )


@pytest.mark.parametrize(("old", "new"), [(1, True), (0, False), ("1", 1), (None, "null")])
def test_values_that_python_or_text_would_confuse_differ(old: Any, new: Any) -> None:
    assert [each.kind for each in differences({"a": old}, {"a": new})] == ["changed"]


@given(OBJECTS, OBJECTS)
def test_nothing_differs_exactly_where_the_documents_are_equal(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    assert differences(before, before) == ()
    found = differences(before, after)
    back = differences(after, before)
    assert [each.path for each in found] == [each.path for each in back]
    assert [(each.before, each.after) for each in found] == [
        (each.after, each.before) for each in back
    ]
