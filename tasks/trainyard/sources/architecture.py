"""What compiled code depends on in a model: its configuration and the shapes of its tensors.

Weights are left out: a fine-tune or a refresh of the same architecture has the same digest and can
use the same bundle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainyard.canonical import digest

IDENTITY_FIELDS = frozenset(
    {
        "_name_or_path",  # where the file was saved
        "name_or_path",
        "_commit_hash",  # which commit it was loaded from
        "transformers_version",  # who wrote the file
    }
)
"""Fields of config.json (at any depth) that name a model but change nothing in it. Everything else
counts, also what only might change the code: a needless compilation costs minutes, a wrong reuse
costs answers."""


@dataclass(frozen=True, order=True)
class Tensor:
    """One tensor as the header of a safetensors file describes it."""

    name: str
    dtype: str
    """As in the header, for example `BF16`."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def architecture_digest(config: Mapping[str, Any], tensors: Iterable[Tensor]) -> str:
    """Return the digest of everything about a model that can change its compiled code.

    Args:
        config: the content of config.json.
        tensors: every tensor of every shard, in any order.

    Returns:
        sha256 as 64 hex digits.
    """
    return digest(
        {
            "config": _without_identity(config),
            "tensors": [[t.name, t.dtype, list(t.shape)] for t in sorted(tensors)],
        }
    )


def parameters(tensors: Iterable[Tensor]) -> int:
    """Return the number of elements of all tensors."""
    return sum(tensor.elements for tensor in tensors)


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_OTHERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}


def loaded_bytes(tensors: Iterable[Tensor], dtype: str) -> int:
    """Return the bytes that all tensors take once they are loaded for a target.

    Args:
        tensors: of the checkpoint.
        dtype: of the target: floating point weights are loaded in it. Quantized ones stay as they
            are, so that the result is a bound from below.
    """
    return sum(
        tensor.elements
        * (_BYTES[dtype] if tensor.dtype in _FLOATS else _OTHERS.get(tensor.dtype, 1))
        for tensor in tensors
    )


def _without_identity(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {k: _without_identity(v) for k, v in value.items() if k not in IDENTITY_FIELDS}
        # Newer writers call `torch_dtype` `dtype`; the same model saved again keeps its digest.
        if "torch_dtype" in kept:
            kept.setdefault("dtype", kept.pop("torch_dtype"))
            kept.pop("torch_dtype", None)
        return kept
    if isinstance(value, list):
        return [_without_identity(item) for item in value]
    return value
