"""The checksums that S3 verifies on what we send and keeps with what it stores."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainyard.store.parts import Bytes

Algorithm = Literal["CRC64NVME", "SHA256"]


@dataclass(frozen=True)
class PartSum:
    """The checksum of one part."""

    value: bytes
    size: int
    """Bytes of the part."""

    @property
    def text(self) -> str:
        """As S3 writes it."""
        return b64encode(self.value).decode()


class Checksums:
    """One algorithm: of single pieces and of files made of parts.

    S3 keeps CRC64NVME of the whole file, however it was cut (`FULL_OBJECT`), and of SHA256 the hash
    of the parts' hashes (`COMPOSITE`).
    """

    def __init__(self, algorithm: Algorithm) -> None:
        """Use `algorithm`."""
        self.algorithm = algorithm

    @property
    def field(self) -> str:
        """The name of its field in requests and answers."""
        return f"Checksum{self.algorithm}"

    @property
    def kind(self) -> str:
        """S3's word for what is kept of a file made of parts."""
        return "FULL_OBJECT" if self.algorithm == "CRC64NVME" else "COMPOSITE"

    def of(self, data: Bytes) -> PartSum:
        """Return the checksum of `data`."""
        if self.algorithm == "SHA256":
            return PartSum(hashlib.sha256(data).digest(), len(data))
        from awscrt import checksums

        return PartSum(checksums.crc64nvme(data).to_bytes(8, "big"), len(data))

    def of_file(self, parts: Sequence[PartSum]) -> str:
        """Return what S3 keeps of a file that is made of at least one part."""
        if self.algorithm == "SHA256":
            joined = hashlib.sha256(b"".join(part.value for part in parts)).digest()
            return f"{b64encode(joined).decode()}-{len(parts)}"
        from awscrt import checksums

        whole = int.from_bytes(parts[0].value, "big")
        for part in parts[1:]:
            whole = checksums.combine_crc64nvme(whole, int.from_bytes(part.value, "big"), part.size)
        return b64encode(whole.to_bytes(8, "big")).decode()
