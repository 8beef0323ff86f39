"""Who may do what: by name, by group, by a role that Airflow has checked, and by nobody."""

from __future__ import annotations

from typing import Any

import pytest

from trainyard.errors import Refused
from trainyard.permissions import Act, Asker, allowed_of, demand, people, refusal
from trainyard.spec.environments import Environments


def environments(*, release: Any = None, **allowed: Any) -> Environments:
    return Environments.model_validate(
        {
            "schema": "trainyard/v1",
            "groups": {"managers": ["ada", "bob"], "nobody": []},
            "release": release,
            "environments": {
                "staging": {"target": "cpu"},
                "production": {"target": "cpu", "allowed": allowed},
            },
        }
    )


@pytest.mark.parametrize("act", ["promote", "rollback", "approve"])
def test_what_the_file_does_not_say_is_left_to_airflow(act: Act) -> None:
    for name in ("eve", ""):
        assert refusal(environments(), act, Asker(name), "production") is None
        assert refusal(environments(), "release", Asker(name)) is None
    assert allowed_of(environments(), act, "production") is None
    assert allowed_of(environments(), act, "elsewhere") is None


@pytest.mark.parametrize(
    ("allowed", "asker", "expected"),
    [
        ({"users": ["eve"]}, Asker("eve"), True),
        ({"users": ["eve"]}, Asker("Eve"), False),
        ({"groups": ["managers"]}, Asker("bob"), True),
        ({"groups": ["managers"]}, Asker("eve"), False),
        ({"groups": ["nobody"]}, Asker("ada"), False),
        ({}, Asker("ada"), False),
        ({"roles": ["Lead"]}, Asker("eve"), False),
        ({"roles": ["Lead"]}, Asker("eve", checked_roles=True), True),
        ({"users": ["ada"]}, Asker("eve", checked_roles=True), False),
        ({"users": ["ada"]}, Asker(""), False),
        ({"roles": ["Lead"]}, Asker("", checked_roles=True), False),
        ({"users": ["ada"], "schedule": True}, Asker(""), True),
        ({"schedule": True}, Asker("ada"), False),
    ],
)
def test_one_line_that_names_the_asker_is_enough(
    allowed: dict[str, Any], asker: Asker, expected: bool
) -> None:
    for act in ("promote", "rollback", "approve"):
        found = refusal(environments(**{act: allowed}), act, asker, "production")
        assert (found is None) is (expected or (act == "rollback" and not asker.name))
        # Another environment, another thing: other people.
        assert refusal(environments(**{act: allowed}), act, asker, "staging") is None
    found = refusal(environments(release=allowed), "release", asker)
    assert (found is None) is expected


def test_a_rollback_of_trainyards_own_is_never_refused() -> None:
    """The watch rolls back in a run that a schedule, or anybody, has started."""
    file = environments(rollback={"users": ["ada"]}, promote={"users": ["ada"]})
    for asker in (Asker(""), Asker("eve", through_run=True)):
        assert refusal(file, "rollback", asker, "production") is None
        assert refusal(file, "promote", asker, "production") is not None
    assert refusal(file, "rollback", Asker("eve"), "production") is not None


def test_a_refusal_says_who_may() -> None:
    file = environments(promote={"users": ["ada"], "groups": ["managers"], "roles": ["Lead"]})
    with pytest.raises(Refused) as refused:
        demand(file, "promote", Asker("eve"), "production")
    said = str(refused.value)
    assert said.startswith(
        "eve may not promote to production: only ada or the group managers or the role Lead may."
    )
    assert "not through another run" in said


def test_a_schedule_is_told_how_it_would_be_allowed() -> None:
    file = environments(promote={"users": ["ada"]})
    with pytest.raises(Refused, match="set `schedule: true`"):
        demand(file, "promote", Asker(""), "production")


def test_people_are_counted_once() -> None:
    file = environments(approve={"users": ["bob", "eve"], "groups": ["managers"]})
    allowed = allowed_of(file, "approve", "production")
    assert allowed is not None
    assert people(allowed, file.groups) == ("bob", "eve", "ada")
