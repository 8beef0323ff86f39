"""A fake of Prometheus' HTTP API that holds what it is told, and answers badly when it is told to.

It knows the two questions that the reader asks: samples of a window (`{…}[45s]` at a time), and
series at even steps of a range. The real one is in `tests/integration/test_prometheus.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs

Labels = tuple[tuple[str, str], ...]
_MATCHER = re.compile(r'(\w+)(=~|=)"((?:[^"\\]|\\.)*)"')


@dataclass
class Asked:
    """A question as it came."""

    path: str
    form: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass
class FakePrometheus:
    """Series and their samples, and what is wrong with the server."""

    series: dict[Labels, dict[float, str]] = field(default_factory=dict)
    """By labels, the name among them: values by moment, as text."""
    status: int = 200
    body: bytes | None = None
    """What it says whatever it is asked; None: a good answer."""
    clock_s: float | None = None
    """Its clock, for the header `Date`; None: it sends none."""
    trickle: Callable[[], None] | None = None
    """Called between the bytes of an answer, which come one by one then."""
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    def add(self, at_s: float, name: str, value: object, **labels: str) -> None:
        """Hold one sample."""
        key = tuple(sorted({"__name__": name, **labels}.items()))
        self.series.setdefault(key, {})[at_s] = str(value)

    def answer(self, asked: Asked) -> bytes:
        """Return the body of an answer."""
        if self.body is not None:
            return self.body
        form = asked.form
        matchers = [
            (label, kind, re.sub(r"\\(.)", r"\1", text))
            for label, kind, text in _MATCHER.findall(form["query"])
        ]
        window = re.search(r"\[(\d+)s\]$", form["query"])
        result = []
        for key, samples in self.series.items():
            labels = dict(key)
            if all(_matches(labels.get(label, ""), *rest) for label, *rest in matchers):
                values = (
                    _window(samples, float(form["time"]), int(window[1]))
                    if window
                    else _steps(samples, form)
                )
                if values:
                    result.append({"metric": labels, "values": values})
        data = {"resultType": "matrix", "result": result}
        return json.dumps({"status": "success", "data": data}).encode()


def _matches(value: str, kind: str, text: str) -> bool:
    return re.fullmatch(text, value) is not None if kind == "=~" else value == text


def _window(samples: Mapping[float, str], end_s: float, length_s: int) -> list[list[object]]:
    return [[at, samples[at]] for at in sorted(samples) if end_s - length_s <= at <= end_s]


def _steps(samples: Mapping[float, str], form: Mapping[str, str]) -> list[list[object]]:
    values: list[list[object]] = []
    at = float(form["start"])
    while at <= float(form["end"]):
        earlier = [moment for moment in samples if at - 300 < moment <= at]
        if earlier:
            values.append([at, samples[max(earlier)]])
        at += float(form["step"])
    return values


@contextmanager
def fake_prometheus() -> Iterator[FakePrometheus]:
    """Serve on a free port of loopback."""
    fake = FakePrometheus()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            form = {name: values[0] for name, values in parse_qs(sent.decode()).items()}
            asked = Asked(self.path, form, dict(self.headers), sent)
            fake.asked.append(asked)
            body = fake.answer(asked)
            self.send_response_only(fake.status)
            if fake.clock_s is not None:
                self.send_header("Date", formatdate(fake.clock_s, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                for byte in (
                    (body[i : i + 1] for i in range(len(body))) if fake.trickle else (body,)
                ):
                    self.wfile.write(byte)
                    if fake.trickle:
                        self.wfile.flush()
                        fake.trickle()
            except OSError:
                # The client has gone, as it should.
                pass

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
