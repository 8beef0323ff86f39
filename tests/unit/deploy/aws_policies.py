"""A small judge of AWS policies, for tests.

It knows what our policies use and stumbles over anything else, so that nothing is passed over in
silence. It does not know `NotAction`, `NotResource`, policy variables, permission boundaries, the
policies of organisations, sessions and VPC endpoints: AWS asks those too, and they only take away.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Statement = Mapping[str, Any]
Context = Mapping[str, str]
"""Condition keys of a request; one that is missing is missing in the request."""

_KNOWN = {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}


def allowed(
    own: Iterable[Statement],
    bucket: Iterable[Statement],
    action: str,
    resource: str,
    context: Context,
) -> bool:
    """Tell whether a principal of the bucket's account may do it."""
    applying = [each for each in (*own, *bucket) if _applies(each, action, resource, context)]
    effects = {each["Effect"] for each in applying}
    return "Deny" not in effects and "Allow" in effects


def _applies(statement: Statement, action: str, resource: str, context: Context) -> bool:
    assert set(statement) <= _KNOWN, statement
    assert statement.get("Principal", "*") == "*", statement
    return (
        any(_like(each, action) for each in statement["Action"])
        and any(_like(each, resource) for each in statement["Resource"])
        and all(
            _holds(operator, key, wanted, context)
            for operator, tests in statement.get("Condition", {}).items()
            for key, wanted in tests.items()
        )
    )


def _like(pattern: str, text: str) -> bool:
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(expression, text, re.DOTALL) is not None


def _holds(operator: str, key: str, wanted: str | list[str], context: Context) -> bool:
    values = [wanted] if isinstance(wanted, str) else wanted
    found = context.get(key)
    if operator == "Null":
        return (found is None) == (values == ["true"])
    name, if_exists, _ = operator.partition("IfExists")
    if found is None:
        # A condition that denies something unlike also holds for what is not there.
        return bool(if_exists) or "Not" in name
    match name:
        case "Bool" | "StringEquals":
            return found in values
        case "StringNotEquals":
            return found not in values
        case "StringLike" | "ArnLike":
            return any(_like(each, found) for each in values)
        case "StringNotLike" | "ArnNotLike":
            return not any(_like(each, found) for each in values)
    raise AssertionError(f"The judge does not know {operator}.")
