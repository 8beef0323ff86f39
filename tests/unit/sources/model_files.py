"""Makes small model folders for the tests of sources and downloads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4,
    "torch_dtype": "float32",
}

WEIGHTS = {"embed": [2, 4], "norm": [4]}


def safetensors(shapes: Mapping[str, list[int]], *, fill: int = 0) -> bytes:
    """Return a safetensors file of float32 tensors whose bytes are all `fill`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes([fill]) * position


def write_model(folder: Path, *, fill: int = 0, config: Mapping[str, Any] = CONFIG) -> Path:
    """Write a complete revision into `folder` and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    (folder / "model.safetensors").write_bytes(safetensors(WEIGHTS, fill=fill))
    return folder
