"""The store that the settings name."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainyard.errors import BadInput
from trainyard.settings import Settings
from trainyard.store.folder import FolderStore
from trainyard.store.protocol import Store
from trainyard.store.s3 import S3Store
from trainyard.store.s3_client import AwsCredentials


def open_store(settings: Settings, credentials: AwsCredentials | None = None) -> Store:
    """Return the store of this installation.

    Args:
        settings: of this installation.
        credentials: for a bucket, where they do not come from boto3's own chain.

    Raises:
        BadInput: `TRAINYARD_STORE` is neither a folder, nor a `file:` or `s3:` URL.
    """
    name = settings.store
    parts = urlsplit(name)
    if "://" not in name:
        return FolderStore(settings.store_root)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        return FolderStore(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        return S3Store(settings, credentials)
    raise BadInput(
        f"TRAINYARD_STORE names a store of kind {parts.scheme!r}, which this version cannot use.",
        hint="Name a folder, such as /srv/trainyard/store, or s3://bucket/prefix.",
    )


def demand_content(store: Store) -> None:
    """Raise if the store is a folder without anything in it: new, or not mounted.

    For whoever would take that for an answer. A bucket that is away says so itself.

    Raises:
        Transient: it has nothing.
        BadInput: it is no folder.
    """
    if isinstance(store, FolderStore):
        store.demand_content()
