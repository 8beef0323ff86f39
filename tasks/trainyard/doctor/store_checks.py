"""Is the store there, does it keep its promises, and where may this identity write?"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping

from trainyard.doctor.report import Check, failed, ok, warn
from trainyard.doctor.report import fail as wrong
from trainyard.errors import BadInput, Conflict, TrainyardError
from trainyard.store.protocol import Store

WRITERS: Mapping[str, tuple[str, ...]] = {
    "plan": ("plans", "evals", "status", "locks"),
    "download": ("checkpoints", "status", "locks"),
    "compile": ("bundles", "status", "locks"),
    "measure": ("measurements", "status", "locks"),
    "gate": ("verdicts", "reports", "status", "locks"),
    "publish": ("releases", "attestations", "status", "locks"),
    "rollout": ("channels", "rollouts", "attestations", "status", "locks"),
    "serving": (),
    "doctor": ("proofs",),
}
"""Folders that each identity writes; all others it only reads."""

MUTABLE = "locks"
"""Folder whose documents change; most others are written once, and policies say so."""
EVERY = tuple(sorted({folder for folders in WRITERS.values() for folder in folders}))


def store_checks(store: Store, identity: str = "") -> Iterator[Check]:
    """Yield what is found out about an opened store; what is written is removed again if it may be.

    Args:
        store: opened, which shows that it is there.
        identity: whose rights these should be, a key of `WRITERS`; empty: not compared.
    """
    yield ok("store", f"{store.url} answers.")
    may: list[str] = []
    may_not: dict[str, TrainyardError] = {}
    left: list[str] = []
    for folder in EVERY:
        key = f"{folder}/doctor-{secrets.token_hex(6)}"
        try:
            store.create(key, b"written by trainyard doctor\n")
        except BadInput as error:
            may_not[folder] = error
        except TrainyardError as error:
            yield failed(f"store: {folder}", error)
            return
        else:
            may.append(folder)
            if folder == MUTABLE:
                yield _conditional(store, key)
            left += _remove(store, key)
    if left:
        yield warn(
            "store: left behind",
            f"This identity may not remove what it writes; left are {', '.join(left)}.",
            "As it should be for most. Remove them as somebody who may: nothing needs them.",
        )
    yield from _rights(may, may_not, identity)


def _remove(store: Store, key: str) -> list[str]:
    """Remove a key of ours; return it if that is not allowed."""
    try:
        store.delete(key)
    except BadInput:
        return [key]
    return []


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
    may: list[str], may_not: Mapping[str, TrainyardError], identity: str
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
    lacking = [folder for folder in wanted if folder in may_not]
    beyond = [folder for folder in may if folder not in wanted]
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
