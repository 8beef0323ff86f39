"""What is recorded of an image: the versions that code compiled in it depends on."""

from __future__ import annotations

from trainyard.documents.base import Document


class ToolchainRecord(Document):
    """`toolchains/<digest of image and lane>.json`, written in the image by `trainyard toolchain`.

    The last writer wins: a tag may be pushed again. Every compile compares it with what it sees.
    """

    image: str
    """As the environments file or the target names it."""
    lane: str
    toolchain: dict[str, str]
    """As the lane reads it from the serving interpreter."""
