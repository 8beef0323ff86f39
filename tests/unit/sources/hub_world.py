"""What tests of the Hub as a source start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.hub_server import HubServer
from tests.unit.sources.model_files import CONFIG, WEIGHTS, safetensors

from trainyard.canonical import canonical_json
from trainyard.settings import Settings
from trainyard.sources.hub import HubSource
from trainyard.spec.model import HuggingFaceSource

REPO = "yard/adder"


def model(*, fill: int = 0, **files: bytes) -> dict[str, bytes]:
    """Return the files of a small complete model; keywords with `__` for `.` add or replace."""
    return {
        "config.json": canonical_json(CONFIG),
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": safetensors(WEIGHTS, fill=fill),
        **{name.replace("__", "."): content for name, content in files.items()},
    }


def settings(server: HubServer, **changes: Any) -> Settings:
    """Return settings that lead to the server."""
    values: Mapping[str, Any] = {
        "hub_endpoint": server.url,
        "source_timeout_s": 10,
        "source_attempts": 3,
        **changes,
    }
    return Settings(**values)


def hub(
    server: HubServer,
    *,
    token: str = "",
    timeout_s: float = 10,
    endpoint: str = "",
    **spec: Any,
) -> HubSource:
    """Return the model on the server as a source."""
    return HubSource(
        HuggingFaceSource(kind="huggingface", repo=REPO, **spec),
        settings(
            server,
            hub_token=token,
            source_timeout_s=timeout_s,
            hub_endpoint=endpoint or server.url,
        ),
    )
