"""A proxy before a fake of S3 that enforces what the fake does not, and fails on demand.

The fake is moto in server mode. Its answers to conditions are S3's (`If-None-Match` on PUT and on
the completion of a multipart upload, `If-Match` on PUT and DELETE), but it looks first and writes
then, so that simultaneous requests slip through, and it knows less of checksums. `RealSemantics`
adds what S3 promises beyond that:

- requests that change one key are decided one after the other;
- the checksum of an upload is compared with its body (`BadDigest`), that of a part with what the
  completion says (`InvalidPart`), that of the whole with its parts (`BadDigest`);
- the checksum of a part is of the algorithm that the upload was begun with (`InvalidRequest`);
- a part of an upload that was ended is refused (`NoSuchUpload`; the fake breaks down);
- a listing of parts tells their checksums;
- an expected bucket owner that is another is refused.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import threading
import time
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from awscrt import checksums

OWNER = "123456789012"
_HOP = {"connection", "content-length", "expect", "keep-alive", "transfer-encoding"}
_FOREVER_S = 3600.0


@dataclass(frozen=True)
class Request:
    """A request as it came in."""

    method: str
    target: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def path(self) -> str:
        """`/bucket/key`."""
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        """Parameters of the query."""
        found = parse_qs(urlsplit(self.target).query, keep_blank_values=True)
        return {name: values[0] for name, values in found.items()}

    @property
    def is_part(self) -> bool:
        """Does it upload a part?"""
        return self.method == "PUT" and "partNumber" in self.query

    @property
    def is_write(self) -> bool:
        """Does it write a whole object on its own?"""
        return self.method == "PUT" and not self.is_part

    @property
    def begins_upload(self) -> bool:
        """Does it begin a multipart upload?"""
        return self.method == "POST" and "uploads" in self.query

    @property
    def is_complete(self) -> bool:
        """Does it end a multipart upload?"""
        return self.method == "POST" and "uploadId" in self.query


@dataclass(frozen=True)
class Answer:
    """An answer as it goes out."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def error(cls, status: int, code: str) -> Answer:
        """Return an error as S3 writes it."""
        body = f"<Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
        return cls(status, {"Content-Type": "application/xml"}, body)


@dataclass
class Fault:
    """Something that goes wrong with some requests."""

    when: Callable[[Request], bool]
    times: int = 1
    """So often, then no more."""
    answer: Answer | None = None
    """Given instead of the true one; None: the connection is cut."""
    done_all_the_same: bool = False
    """The request is done before it fails: the client cannot know."""
    cut_after: int | None = None
    """The true answer is cut after so many bytes of its body."""
    silent: bool = False
    """Nothing is answered until the client gives up."""
    flip: bool = False
    """A bit of the request's body is flipped on the way; nothing else happens."""
    hits: int = 0

    @property
    def is_before(self) -> bool:
        """Does it happen before the request is done?"""
        return self.cut_after is None and not self.done_all_the_same and not self.flip


@dataclass
class RealSemantics:
    """What S3 promises and the fake does not do."""

    ignored: list[tuple[Callable[[Request], bool], str]] = field(default_factory=list)
    """Headers that some requests lose, as if the store did not know them."""
    _mutex: threading.Lock = field(default_factory=threading.Lock)
    _keys: dict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))
    _parts: dict[tuple[str, int], tuple[str, str, int]] = field(default_factory=dict)
    """Algorithm, checksum and size of each part, by upload and number."""
    _announced: dict[str, str] = field(default_factory=dict)
    """The algorithm that each upload was begun with; empty if none was named."""

    @contextmanager
    def in_turn(self, request: Request) -> Iterator[None]:
        """Let one request at a time change a key."""
        if request.method not in {"PUT", "POST", "DELETE"} or request.is_part:
            yield
            return
        with self._mutex:
            lock = self._keys[request.path]
        with lock:
            yield

    def objection(self, request: Request) -> Answer | None:
        """Return the error that S3 would answer and the fake does not."""
        if request.headers.get("x-amz-expected-bucket-owner", OWNER) != OWNER:
            return Answer.error(403, "AccessDenied")
        for algorithm in ("crc64nvme", "sha256"):
            said = request.headers.get(f"x-amz-checksum-{algorithm}")
            if said is None:
                continue
            upload = request.query.get("uploadId", "")
            if self._announced.get(upload, algorithm) != algorithm:
                return Answer.error(400, "InvalidRequest")
            if request.is_complete:
                if said != self._of_parts(request, algorithm):
                    return Answer.error(400, "BadDigest")
            elif said != checksum(algorithm, request.body):
                return Answer.error(400, "BadDigest")
        if request.is_complete and not self._parts_match(request):
            return Answer.error(400, "InvalidPart")
        return None

    def note(self, request: Request, answer: Answer) -> Answer:
        """Remember checksums of parts and their algorithm; tell them when parts are listed."""
        upload = request.query.get("uploadId", "")
        if request.begins_upload and answer.status == 200:
            begun = re.findall(rb"<UploadId>([^<]+)<", answer.body)[0].decode()
            algorithm = request.headers.get("x-amz-checksum-algorithm", "")
            self._announced[begun] = algorithm.lower()
        if request.is_part and answer.status == 500:
            return Answer.error(404, "NoSuchUpload")
        if request.is_part and answer.status == 200:
            for algorithm in ("crc64nvme", "sha256"):
                said = request.headers.get(f"x-amz-checksum-{algorithm}")
                if said:
                    number = int(request.query["partNumber"])
                    self._parts[upload, number] = (algorithm, said, len(request.body))
        if request.method == "GET" and upload and answer.status == 200:
            body = re.sub(
                rb"<PartNumber>(\d+)</PartNumber>",
                lambda found: found.group() + self._xml(upload, int(found.group(1))),
                answer.body,
            )
            return Answer(answer.status, answer.headers, body)
        return answer

    def _xml(self, upload: str, number: int) -> bytes:
        if (upload, number) not in self._parts:
            return b""
        algorithm, said, _ = self._parts[upload, number]
        name = f"Checksum{algorithm.upper()}"
        return f"<{name}>{said}</{name}>".encode()

    def _listed(self, request: Request) -> list[tuple[int, str]]:
        """Return number and checksum of the parts that a completion names."""
        parts = re.findall(rb"<Part>.*?</Part>", request.body, re.DOTALL)
        numbers = [int(re.findall(rb"<PartNumber>(\d+)<", part)[0]) for part in parts]
        said = [re.findall(rb"<Checksum\w+>([^<]+)<", part) for part in parts]
        return [
            (number, found[0].decode() if found else "")
            for number, found in zip(numbers, said, strict=True)
        ]

    def _parts_match(self, request: Request) -> bool:
        upload = request.query["uploadId"]
        return all(
            not said or self._parts.get((upload, number), ("", "", 0))[1] == said
            for number, said in self._listed(request)
        )

    def _of_parts(self, request: Request, algorithm: str) -> str:
        upload = request.query["uploadId"]
        parts = [self._parts[upload, number] for number, _ in self._listed(request)]
        values = [b64decode(said) for _, said, _ in parts]
        if algorithm == "sha256":
            joined = hashlib.sha256(b"".join(values)).digest()
            return f"{b64encode(joined).decode()}-{len(parts)}"
        whole = int.from_bytes(values[0], "big")
        for value, (_, _, size) in zip(values[1:], parts[1:], strict=True):
            whole = checksums.combine_crc64nvme(whole, int.from_bytes(value, "big"), size)
        return b64encode(whole.to_bytes(8, "big")).decode()


def checksum(algorithm: str, data: bytes) -> str:
    """Return a checksum as S3 writes it."""
    if algorithm == "sha256":
        return b64encode(hashlib.sha256(data).digest()).decode()
    return b64encode(checksums.crc64nvme(data).to_bytes(8, "big")).decode()


class FaultyProxy:
    """The proxy, on a free port of loopback; a context manager."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        """Forward to `upstream`."""
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        """All that came, without bodies of parts."""
        self.part_bytes: dict[str, int] = defaultdict(int)
        """Bytes of parts that the fake has taken, by path."""
        self.semantics = RealSemantics()
        self._mutex = threading.Lock()
        self._stopping = threading.Event()
        proxy = self

        class Handler(_Handler):
            world = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, when: Callable[[Request], bool], **how: object) -> Fault:
        """Let some requests fail from now on."""
        fault = Fault(when, **how)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def reset(self) -> None:
        """Forget faults and requests."""
        with self._mutex:
            self.faults.clear()
            self.requests.clear()
            self.part_bytes.clear()
            self.semantics.ignored.clear()

    def __enter__(self) -> FaultyProxy:
        """Start."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def handle(self, request: Request) -> tuple[Answer | None, int | None]:
        """Return the answer (None: none at all) and after how many bytes it is cut."""
        fault = self._fault(request)
        if fault is not None and fault.silent:
            self._stopping.wait(_FOREVER_S)
            return None, None
        if fault is not None and fault.is_before:
            return fault.answer, None
        if fault is not None and fault.flip:
            body = bytes([request.body[0] ^ 1]) + request.body[1:]
            request = Request(request.method, request.target, request.headers, body)
        answer = self._forward(request)
        if fault is None or fault.flip:
            return answer, None
        return (answer, fault.cut_after) if fault.cut_after is not None else (fault.answer, None)

    def _fault(self, request: Request) -> Fault | None:
        with self._mutex:
            kept = b"" if request.is_part else request.body
            self.requests.append(Request(request.method, request.target, request.headers, kept))
            for fault in self.faults:
                if fault.hits < fault.times and fault.when(request):
                    fault.hits += 1
                    return fault
        return None

    def _forward(self, request: Request) -> Answer:
        with self.semantics.in_turn(request):
            objection = self.semantics.objection(request)
            if objection is not None:
                return objection
            connection = http.client.HTTPConnection(*self.upstream, timeout=60)
            try:
                lost = {name for when, name in self.semantics.ignored if when(request)}
                headers = {n: v for n, v in request.headers.items() if n not in _HOP | lost}
                connection.request(request.method, request.target, request.body, headers)
                response = connection.getresponse()
                answer = Answer(response.status, dict(response.getheaders()), response.read())
            finally:
                connection.close()
        if request.is_part and answer.status == 200:
            with self._mutex:
                self.part_bytes[request.path] += len(request.body)
        return self.semantics.note(request, answer)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    # Many clients connect at the same moment.
    request_queue_size = 256


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: FaultyProxy

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(length)
        if len(body) < length:
            # The client died; S3 does nothing with half a request.
            self.close_connection = True
            return
        request = Request(self.command, self.path, headers, body)
        answer, cut_after = self.world.handle(request)
        if answer is None:
            self.close_connection = True
            return
        self._send(request, answer, cut_after)

    def _send(self, request: Request, answer: Answer, cut_after: int | None) -> None:
        self.send_response_only(answer.status)
        length = str(len(answer.body))
        for name, value in answer.headers.items():
            if name.lower() == "content-length" and request.method == "HEAD":
                length = value
            if name.lower() not in _HOP:
                self.send_header(name, value)
        if answer.status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if cut_after is not None:
            self.wfile.write(answer.body[:cut_after])
            self.wfile.flush()
            self.close_connection = True
        elif request.method != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def handle(self) -> None:
        """Serve one connection; clients that die are no news."""
        try:
            super().handle()
        except ConnectionError:
            time.sleep(0)
