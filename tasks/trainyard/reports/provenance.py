"""Who signed a release and from what it was made, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Collection

from rich.table import Table

from trainyard.documents.release import Release
from trainyard.errors import BadInput, RevokedKey

_DIGITS = 12


def signed_by(load: Callable[[], Release]) -> str:
    """Return who signed the release that `load` loads and checks, or what is wrong with it."""
    try:
        signature = load().signature
    except RevokedKey:
        return "a revoked key"
    except BadInput as error:
        return f"NOT VALID: {error.message}"
    if signature is None:
        return "nobody"
    return f"{signature.signer} {signature.key_id[:_DIGITS]}".strip()


def provenance_table(release: Release, lost: Collection[str]) -> Table:
    """Return the table of a release whose signature was checked.

    Args:
        release: the release.
        lost: keys of pinned documents that are gone or changed.
    """
    table = Table("What", "Value", title=release.release_id, show_header=False)
    made, signature = release.provenance, release.signature
    rows = [
        ("Signed by", signature.signer if signature else "nobody"),
        ("Key", f"{signature.key_id} ({signature.scheme})" if signature else ""),
        ("Signed on", f"{release.created_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("Asked for by", made.requested_by),
        ("Run", made.dag_run),
        ("Made by", f"{release.builder}, trainyard {made.code_version}"),
        ("Source", f"{release.source} {release.revision}".strip()),
        ("Checkpoint", release.checkpoint_digest),
        ("Compile key", release.compile_key),
        ("Bundle", release.bundle_digest),
        ("Serving", release.serving_digest),
        ("Image", release.image),
        *((f"Toolchain: {name}", value) for name, value in sorted(release.toolchain.items())),
    ]
    for pin in release.pins:
        state = "GONE OR CHANGED" if pin.key in lost else "unchanged"
        rows.append((pin.name, f"{pin.key}: {state}"))
    for what, value in rows:
        if value:
            table.add_row(what, value)
    return table
