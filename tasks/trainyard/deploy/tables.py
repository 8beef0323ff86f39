"""The tables of `docs/rights.md`: made from what is rendered, so that they cannot be wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from trainyard.deploy.kustomize import Object
from trainyard.deploy.rbac import READS, Right, rights
from trainyard.deploy.rights import COMPARED, FREE, KEYS, ROLES, WRITTEN_ONCE, Role

_HEAD = """# Rights

*Made by `trainyard render rights production`; a test compares it with what is rendered.*

Who may write what. Whatever is not here is refused.

## In the store

Every role below reads the whole store. It writes and deletes only this. The bucket's own policy
says it again for everybody else in the account. Each role that writes also tries the store's
conditional writes, below `.trainyard/`.

"""


def markdown(objects: Sequence[Object]) -> str:
    """Return the whole page for a set of manifests."""
    return "".join(
        (
            _HEAD,
            _store_table(),
            "\n### How keys are written\n\n",
            _how_table(),
            "\n## In the cluster\n\nNobody but the guard may change a route's weights. Servers "
            "and steps have no right at all.\n\n",
            _cluster_table(rights(objects)),
        )
    )


def _store_table() -> str:
    rows = [
        (
            f"`{role.account}`",
            role.does,
            _keys(role.writes),
            _keys(role.deletes),
            _also(role),
        )
        for role in ROLES
    ]
    return _table(("service account", "what it does", "writes", "deletes", "also"), rows)


def _keys(patterns: Iterable[str]) -> str:
    return ", ".join(f"`{each}`" for each in patterns if each != ".trainyard/*") or "none"


def _also(role: Role) -> str:
    also = ["signs with the KMS key"] * role.signs
    also += [f"{role.logs} Airflow's logs"] * bool(role.logs)
    return ", ".join(also) or "none"


def _how_table() -> str:
    how = {
        **dict.fromkeys(WRITTEN_ONCE, "once: `If-None-Match: *` is demanded"),
        **dict.fromkeys(COMPARED, "compared: `If-None-Match` or `If-Match` is demanded"),
        **dict.fromkeys(FREE, "freely: the last writer wins"),
    }
    rows = []
    for key in KEYS:
        folder = key.partition("/")[0]
        holders = [
            role.account.removeprefix("trainyard-")
            for role in ROLES
            if any(each.partition("/")[0] == folder for each in role.writes)
        ]
        rows.append((f"`{key}`", how[key], ", ".join(holders)))
    return _table(("keys", "written", "by"), rows)


def _cluster_table(found: Iterable[Right]) -> str:
    verbs: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    reading = set()
    for right in sorted(found):
        where = f"`{right.namespace}`" if right.namespace else "whole cluster"
        if right.verb in READS:
            reading.add((right.account, where))
        else:
            only = f" (only `{right.name}`)" if right.name else ""
            verbs[right.account, where, f"`{right.resource}`"].append(f"{right.verb}{only}")
    for account, where in reading - {key[:2] for key in verbs}:
        verbs[account, where, "none"] = ["reads only"]
    together: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for (account, where, resource), may in sorted(verbs.items()):
        together[where, resource, ", ".join(may)].append(f"`{account}`")
    rows = [(", ".join(accounts), *what) for what, accounts in sorted(together.items())]
    return _table(("service account", "where", "what", "may"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
