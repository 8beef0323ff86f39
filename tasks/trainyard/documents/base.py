"""What every stored document has in common."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainyard import __version__
from trainyard.canonical import digest
from trainyard.settings import Settings

SCHEMA: Literal["trainyard/v1"] = "trainyard/v1"

CHECKSUM = "checksum"
"""Name of the member of a stored document that holds the digest of the others."""


class Frozen(BaseModel):
    """A value: immutable, and it knows all its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class FileEntry(Frozen):
    """One file of a checkpoint or bundle."""

    path: str
    """Relative POSIX path inside its folder."""
    size: int
    """Bytes."""
    sha256: str
    """64 lower-case hex digits."""


class Provenance(Frozen):
    """Who made a document, with what, from what."""

    requested_by: str = ""
    dag_run: str = ""
    code_version: str = __version__
    image: str = ""
    """The container image it was made in; empty: none, or nobody said."""
    host: str = ""
    inputs: tuple[str, ...] = ()
    """Keys of the documents this one was made from."""

    @classmethod
    def of(cls, settings: Settings, *inputs: str) -> Provenance:
        """Return the provenance of something this process makes now."""
        return cls(
            requested_by=settings.requested_by,
            dag_run=settings.dag_run,
            image=settings.image,
            host=platform.node(),
            inputs=inputs,
        )


class Document(Frozen):
    """A stored document."""

    schema_: Literal["trainyard/v1"] = Field(default=SCHEMA, alias="schema")
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    provenance: Provenance = Provenance()

    @model_validator(mode="before")
    @classmethod
    def _without_checksum(cls, value: Any) -> Any:
        """The checksum is about the stored text; the document itself does not carry it."""
        if isinstance(value, dict) and CHECKSUM in value:
            return {name: part for name, part in value.items() if name != CHECKSUM}
        return value

    def to_bytes(self) -> bytes:
        """Return the document as it is stored: indented UTF-8 JSON with a final newline.

        Its last member, `checksum`, is the digest of all others: whoever reads the document from a
        store finds a byte that changed there.
        """
        text = self.model_dump_json(by_alias=True, indent=2)
        checksum = digest(json.loads(text))
        body = text.removesuffix("\n}")
        return f'{body},\n  "{CHECKSUM}": "{checksum}"\n}}\n'.encode()


def has_right_checksum(data: bytes) -> bool:
    """Tell whether a stored document, which is valid JSON, is as it was written.

    Documents of earlier versions have no checksum; nothing can be said about them, so they count.
    """
    value = json.loads(data)
    try:
        return CHECKSUM not in value or value.pop(CHECKSUM) == digest(value)
    except ValueError:
        # NaN or infinity, which no document is written with.
        return False
