"""A small server of streamed completions, as vLLM's, on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.unit.rollout.loopback import Answer, serving

Reply = Callable[[dict[str, Any]], list[str] | int]
"""Body of a request to the pieces of its answer, a token each, or to an error's status."""


def events(pieces: list[str], *, ids: bool = True, usage: bool = True) -> list[str]:
    """Return the lines of a stream."""
    lines = []
    for number, piece in enumerate(pieces):
        last = number + 1 == len(pieces)
        choice: dict[str, Any] = {"text": piece, "finish_reason": "stop" if last else None}
        if ids:
            choice["token_ids"] = [ord(character) for character in piece]
        lines.append(json.dumps({"choices": [choice]}))
    if usage:
        lines.append(json.dumps({"choices": [], "usage": {"completion_tokens": len(pieces)}}))
    return [*lines, "[DONE]"]


@contextmanager
def completions(reply: Reply) -> Iterator[str]:
    """Serve on a free port and yield the URL; ends with its `with` block."""

    def respond(_: str, body: bytes) -> Answer:
        found = reply(json.loads(body))
        if isinstance(found, int):
            return found, b""
        return 200, "".join(f"data: {line}\n\n" for line in events(found)).encode()

    with serving(respond) as url:
        yield url
