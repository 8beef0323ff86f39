"""Where notices arrive in tests: a webhook and a mail server, on loopback, stopped by the test."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Webhook:
    """What came in, and what is answered."""

    answers: list[int] = field(default_factory=list)
    """Status of each answer; 200 after the last."""
    bodies: list[Any] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    hold: threading.Event | None = None
    """Nothing is answered until it is set."""
    port: int = 0

    def url(self, path: str = "/services/T0/B0/the-secret") -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextlib.contextmanager
def webhook(*answers: int) -> Iterator[Webhook]:
    """Yield a webhook that gives these answers, then 200."""
    made = Webhook(list(answers))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if made.hold is not None:
                made.hold.wait(30)
            made.bodies.append(json.loads(body))
            made.paths.append(self.path)
            made.keys.append(self.headers["Idempotency-Key"])
            with contextlib.suppress(OSError):
                self.send_response(made.answers.pop(0) if made.answers else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        made.port = server.server_address[1]
        yield from _serving(server, made)


@dataclass
class MailServer:
    """Mails that came in."""

    mails: list[Message] = field(default_factory=list)
    recipients: list[str] = field(default_factory=list)
    port: int = 0


@contextlib.contextmanager
def mail_server() -> Iterator[MailServer]:
    """Yield a server that speaks as much SMTP as a client without login needs."""
    made = MailServer()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.say("220 yard")
            while line := self.rfile.readline().decode().strip():
                verb = line.split(maxsplit=1)[0].upper()
                if verb == "RCPT":
                    made.recipients.append(line.partition(":")[2].strip(" <>"))
                if verb == "DATA":
                    self.say("354 go on")
                    self.take()
                self.say("221 bye" if verb == "QUIT" else "250 ok")
                if verb == "QUIT":
                    return

        def say(self, line: str) -> None:
            self.wfile.write(f"{line}\r\n".encode())

        def take(self) -> None:
            lines = []
            while (line := self.rfile.readline()) != b".\r\n":
                lines.append(line)
            made.mails.append(message_from_bytes(b"".join(lines), policy=default))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        made.port = server.server_address[1]
        yield from _serving(server, made)


def _serving(server: socketserver.BaseServer, made: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join(10)
        assert not thread.is_alive()
