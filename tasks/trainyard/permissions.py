"""Who may do what: the environments file's answer, for the user whom Airflow names.

Pure. Airflow's own rights (by DAG and role) come first and are Airflow's to check; this is what
they cannot say: the same user may start a release and yet not have it promoted to production.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainyard.errors import Refused
from trainyard.spec.environments import Environments
from trainyard.spec.ways import Allowed

Act = Literal["release", "promote", "rollback", "approve"]

Groups = Mapping[str, Sequence[str]]

_WORDS: dict[Act, str] = {
    "release": "make releases",
    "promote": "promote to {where}",
    "rollback": "roll back {where}",
    "approve": "approve promotions to {where}",
}


@dataclass(frozen=True)
class Asker:
    """Whoever asks for something, as Airflow knows them."""

    name: str
    """The user's name; empty: a run that nobody asked for, such as a scheduled one."""
    checked_roles: bool = False
    """Did Airflow check the roles of this user for this very DAG? Only FAB's auth manager knows the
    roles of the environments file, and not for a run that another run has started."""
    through_run: bool = False
    """Did another run start this one?"""


def allowed_of(environments: Environments, act: Act, environment: str = "") -> Allowed | None:
    """Return who may do something; None if the file leaves it to Airflow's rights.

    Args:
        environments: the file.
        act: what.
        environment: where; nothing for `release`. One that is not in the file forbids nothing here,
            and is refused elsewhere.
    """
    if act == "release":
        return environments.release
    found = environments.environments.get(environment)
    allowed: Allowed | None = getattr(found.allowed, act) if found is not None else None
    return allowed


def refusal(
    environments: Environments, act: Act, asker: Asker, environment: str = ""
) -> Refused | None:
    """Return why `asker` may not do something, or None if they may.

    A rollback that no person asked for directly is Trainyard's own: it watches what serves, and
    must not be kept from bringing a proven release back.
    """
    if act == "rollback" and (asker.through_run or not asker.name):
        return None
    allowed = allowed_of(environments, act, environment)
    if allowed is None or may(allowed, environments.groups, asker):
        return None
    what = _WORDS[act].format(where=environment)
    if not asker.name:
        return Refused(
            f"Nobody asked for this run by name, and only people may {what}.",
            hint="To let scheduled runs do it, set `schedule: true` in the environments file.",
        )
    return Refused(
        f"{asker.name} may not {what}: {describe(allowed)}.",
        hint="Ask one of them, or have the environments file changed." + _about_roles(allowed),
    )


def demand(environments: Environments, act: Act, asker: Asker, environment: str = "") -> None:
    """Raise Refused unless `asker` may do something."""
    why = refusal(environments, act, asker, environment)
    if why is not None:
        raise why


def may(allowed: Allowed, groups: Groups, asker: Asker) -> bool:
    """Tell whether one of the lines of `allowed` names `asker`."""
    if not asker.name:
        return allowed.schedule
    if asker.name in people(allowed, groups):
        return True
    return bool(allowed.roles) and asker.checked_roles


def people(allowed: Allowed, groups: Groups) -> tuple[str, ...]:
    """Return the users whom `allowed` names, itself or by a group, each once."""
    named = [*allowed.users]
    for group in allowed.groups:
        named += groups.get(group, ())
    return tuple(dict.fromkeys(named))


def describe(allowed: Allowed) -> str:
    """Return who may, in words; names of users of groups are left to the file."""
    parts = []
    if allowed.users:
        parts.append(", ".join(allowed.users))
    if allowed.groups:
        parts.append(f"the group {', '.join(allowed.groups)}")
    if allowed.roles:
        parts.append(f"the role {', '.join(allowed.roles)}")
    return f"only {' or '.join(parts)} may" if parts else "nobody may"


def _about_roles(allowed: Allowed) -> str:
    if not allowed.roles:
        return ""
    return (
        " Roles count only with Airflow's FAB auth manager, and only for those who start the DAG "
        "themselves: whoever has such a role starts it in Airflow, not through another run."
    )
