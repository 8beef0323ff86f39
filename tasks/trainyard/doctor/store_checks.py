"""Is the store there, does it keep its promises, and where may this identity write?"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from trainyard.deploy.rights import COMPARED, ROLES
from trainyard.doctor.report import Check, failed, ok, warn
from trainyard.doctor.report import fail as wrong
from trainyard.errors import BadInput, Conflict, TrainyardError
from trainyard.store.protocol import Store

_PROBE = ".trainyard/*"
"""Where every store is probed when it is opened; so it needs no trial here."""

WRITERS: Mapping[str, tuple[str, ...]] = {
    role.account.removeprefix("trainyard-"): tuple(key for key in role.writes if key != _PROBE)
    for role in ROLES
}
"""Patterns of keys that each identity writes, as its policy says; all others it only reads."""

EVERY = tuple(sorted({pattern for patterns in WRITERS.values() for pattern in patterns}))


def store_checks(store: Store, identity: str = "") -> Iterator[Check]:
    """Yield what is found out about an opened store; what is written is removed again if it may be.

    Args:
        store: opened, which shows that it is there.
        identity: whose rights these should be, a key of `WRITERS`; empty: not compared.
    """
    yield ok("store", f"{store.url} answers.")
    may: dict[str, str] = {}
    may_not: dict[str, TrainyardError] = {}
    for pattern in EVERY:
        # Names of their own: in a folder, one key cannot lie below another.
        key = pattern.replace("*", f"doctor-{secrets.token_hex(6)}")
        try:
            store.create(key, b"written by trainyard doctor\n")
        except BadInput as error:
            may_not[pattern] = error
        except TrainyardError as error:
            yield failed(f"store: {pattern}", error)
            break
        else:
            may[pattern] = key
    else:
        compared = [key for key in may.values() if _fits(key, COMPARED)]
        if compared:
            yield _conditional(store, compared[0])
        yield from _rights(may, may_not, identity)
    left = [key for key in may.values() if not _remove(store, key)]
    if left:
        yield warn(
            "store: left behind",
            f"This identity may not remove what it writes; left are {', '.join(left)}.",
            "As it should be for most. Remove them as somebody who may: nothing needs them.",
        )


def _fits(key: str, patterns: tuple[str, ...]) -> bool:
    """Is a key named by one of the patterns? As in a policy, a star stands for slashes too."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _remove(store: Store, key: str) -> bool:
    """Remove a key of ours, if that is allowed and can be done now."""
    try:
        store.delete(key)
    except TrainyardError:
        return False
    return True


def _conditional(store: Store, key: str) -> Check:
    """Try writes that must not happen."""
    name = "store: conditional writes"
    try:
        store.create(key, b"again")
    except Conflict:
        pass
    else:
        return wrong(name, "A key that exists was created a second time.", _NO_PROMISES)
    version = store.read(key).version
    newer = store.replace(key, b"replaced\n", version=version)
    try:
        store.replace(key, b"with an old version\n", version=version)
    except Conflict:
        store.read(key)
        return ok(name, "A second writer is turned away, on creation and on replacement.")
    return wrong(
        name, f"A key was replaced by somebody who had not seen version {newer}.", _NO_PROMISES
    )


_NO_PROMISES = (
    "Two writers could overwrite each other: use AWS S3, a newer S3-compatible store, or a folder "
    "on a local file system."
)


def _rights(
    may: Mapping[str, str], may_not: Mapping[str, TrainyardError], identity: str
) -> Iterator[Check]:
    name = "store: rights"
    if not identity:
        if not may:
            reason = next(iter(may_not.values())).message
            yield warn(name, f"This identity may write nowhere: {reason}", "Fine for servers.")
        elif may_not:
            yield warn(
                name,
                f"This identity writes {', '.join(may)}, and not {', '.join(may_not)}.",
                "Name whose rights these should be with --identity to have them compared.",
            )
        else:
            yield ok(name, f"This identity writes all of {', '.join(may)}.")
        return
    wanted = WRITERS[identity]
    lacking = [pattern for pattern in wanted if pattern in may_not]
    beyond = [pattern for pattern, key in may.items() if not _fits(key, wanted)]
    if lacking:
        yield wrong(
            name,
            f"{identity} must write {', '.join(lacking)} and may not: "
            f"{may_not[lacking[0]].message}",
            "Correct the role's policy; `k8s/` has one for each identity.",
        )
    if beyond:
        yield warn(
            name,
            f"{identity} may write {', '.join(beyond)}, which it has no need of.",
            "Narrow the role's policy; `k8s/` has one for each identity.",
        )
    if not lacking and not beyond:
        yield ok(name, f"{identity} writes {', '.join(wanted) or 'nothing'}, and nothing else.")
