"""A small server of streamed completions, as vLLM's, on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = reply(body)
            status = found if isinstance(found, int) else 200
            lines = [] if isinstance(found, int) else events(found)
            self.send_response(status)
            self.send_header("Connection", "close")
            self.end_headers()
            for line in lines:
                self.wfile.write(f"data: {line}\n\n".encode())

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
