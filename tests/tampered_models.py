"""Copies of a model that are wrong in one way each, as a broken toolchain would serve them.

    python -m tests.tampered_models MODEL OUT KIND...

writes `OUT/<kind>` for each kind. Needs only numpy, so that it runs in both environments; weights
stay in bfloat16, as the file has them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

NOISE = 0.05
"""Standard deviation of the noise, in those of each tensor."""
SEED = 11

Tensors = dict[str, np.ndarray]


def noisy(tensors: Tensors) -> None:
    """Add Gaussian noise to every tensor."""
    random = np.random.default_rng(SEED)
    for name, tensor in tensors.items():
        tensors[name] = tensor + random.normal(0.0, NOISE * tensor.std(), tensor.shape)


def swapped_rows(tensors: Tensors, left: int = 4, right: int = 9) -> None:
    """Exchange two rows of the vocabulary, on the way in and on the way out."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][[left, right]] = tensors[name][[right, left]]


def other_tokenizer(folder: Path, first: str = "2", second: str = "7") -> None:
    """Exchange two characters of the tokenizer's vocabulary."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


WEIGHTS: Mapping[str, Callable[[Tensors], None]] = {
    "noisy": noisy,
    "swapped_rows": swapped_rows,
}
"""Ways to change weights."""

KINDS = (*WEIGHTS, "other_tokenizer", "same")


def tamper(model: Path, out: Path, kind: str) -> Path:
    """Write a copy of `model` that is wrong in the way `kind` (`same`: not at all)."""
    folder = out / kind
    shutil.copytree(model, folder)
    if kind == "other_tokenizer":
        other_tokenizer(folder)
    elif kind in WEIGHTS:
        path = folder / "model.safetensors"
        header, tensors = read_bfloat16(path)
        WEIGHTS[kind](tensors)
        write_bfloat16(path, header, tensors)
    return folder


def read_bfloat16(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Return the header of a safetensors file of bfloat16 tensors, and the tensors as float32."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        assert about["dtype"] == "BF16", about
        begin, end = (8 + size + offset for offset in about["data_offsets"])
        halves = np.frombuffer(data[begin:end], dtype=np.uint16).astype(np.uint32)
        tensors[name] = (halves << 16).view(np.float32).reshape(about["shape"]).copy()
    return header, tensors


def write_bfloat16(path: Path, header: dict[str, Any], tensors: Tensors) -> None:
    """Write tensors as bfloat16 under the header that they were read with."""
    names = sorted(tensors, key=lambda name: int(header[name]["data_offsets"][0]))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            bits = np.ascontiguousarray(tensors[name], dtype=np.float32).view(np.uint32)
            # To the nearest, ties to even, as every converter does it.
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)
            file.write((rounded >> 16).astype(np.uint16).tobytes())


if __name__ == "__main__":
    for wanted in sys.argv[3:]:
        print(tamper(Path(sys.argv[1]), Path(sys.argv[2]), wanted))
