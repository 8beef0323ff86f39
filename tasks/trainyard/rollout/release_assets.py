"""The files that went with a release: prompts, frozen with its plan."""

from __future__ import annotations

from trainyard.documents.plan import Plan
from trainyard.documents.release import Release
from trainyard.store.documents import read_document
from trainyard.store.layout import evals_prefix
from trainyard.store.protocol import Store


def asset_text(store: Store, release: Release, name: str) -> str | None:
    """Return the text of a file that the release's spec names; None if it did not go with it.

    Raises:
        NotFound, CorruptFile: it did, and is gone or broken.
    """
    plans = [key for key in release.provenance.inputs if key.startswith("plans/")]
    assets = read_document(store, plans[0], Plan).assets if plans else None
    if assets is None or name not in assets.files:
        return None
    return store.read(f"{evals_prefix(assets.digest)}/{name}").data.decode()
