"""A fake of S3 and of the Hugging Face Hub that is fast enough not to be what a benchmark measures.

    python tests/fast_fake_s3.py FOLDER PORT

Speaks as much of the two protocols as the benchmarked programs use, believes everybody, and keeps
bodies in files of FOLDER, which it sends with sendfile(2). Its index is in memory: FOLDER/seed/B/…
are objects of bucket B when it starts; so is what lies in FOLDER/hub/<owner>/<name>/…, as the only
revision of a repository. It checks no checksums and sends none.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import socket
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The only revision of every repository."""
_BUFFER = 1 << 20
_XML = '<?xml version="1.0" encoding="UTF-8"?>\n'
_PAGE = 1000


@dataclass
class Stored:
    """An object: the files that its bytes are in, one after the other."""

    segments: list[tuple[Path, int]]
    headers: dict[str, str] = field(default_factory=dict)
    etag: str = field(default_factory=lambda: f'"{secrets.token_hex(16)}"')

    @property
    def size(self) -> int:
        return sum(size for _, size in self.segments)


@dataclass
class Upload:
    """A multipart upload under way."""

    key: str
    headers: dict[str, str]
    parts: dict[int, Stored] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


class Connection:
    """One client; requests are answered in turn."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.buffered = b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serve(self) -> None:
        with self.sock, contextlib.suppress(ConnectionError, BrokenPipeError, TimeoutError):
            while (request := self._request()) is not None:
                self.server.answer(self, request)

    def _request(self) -> Request | None:
        while b"\r\n\r\n" not in self.buffered:
            data = self.sock.recv(65536)
            if not data:
                return None
            self.buffered += data
        head, self.buffered = self.buffered.split(b"\r\n\r\n", 1)
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        path, _, query = target.partition("?")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("expect", "").lower() == "100-continue":
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(
            method,
            urllib.parse.unquote(path),
            dict(urllib.parse.parse_qsl(query, keep_blank_values=True)),
            headers,
        )

    def respond(
        self, status: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        lines = {"Content-Length": str(len(body)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.sock.sendall(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body)

    def send_files(self, segments: list[tuple[Path, int]], start: int, size: int) -> None:
        for path, length in segments:
            if start < length and size > 0:
                count = min(size, length - start)
                with path.open("rb", buffering=0) as file:
                    at, end = start, start + count
                    while at < end:
                        at += os.sendfile(self.sock.fileno(), file.fileno(), at, end - at)
                size -= count
                start = 0
            else:
                start -= length

    def receive(self, request: Request, path: Path | None) -> int:
        """Take the body of a request, into a file if there is one; return its bytes."""
        encodings = [request.headers.get(f"{of}-encoding", "") for of in ("content", "transfer")]
        if any("chunked" in encoding for encoding in encodings):
            pieces = self._chunks()
        else:
            pieces = self._exactly(int(request.headers.get("content-length", "0")))
        total = 0
        with path.open("wb", buffering=0) if path else contextlib.nullcontext() as file:
            for piece in pieces:
                total += len(piece)
                if file is not None:
                    file.write(piece)
        return total

    def body(self, request: Request) -> bytes:
        return b"".join(map(bytes, self._exactly(int(request.headers.get("content-length", "0")))))

    def _exactly(self, size: int) -> Iterator[memoryview]:
        first, self.buffered = self.buffered[:size], self.buffered[size:]
        if first:
            size -= len(first)
            yield memoryview(first)
        room = memoryview(bytearray(min(size, _BUFFER)))
        while size:
            count = self.sock.recv_into(room[: min(size, len(room))])
            if not count:
                raise ConnectionResetError
            size -= count
            yield room[:count]

    def _line(self) -> bytes:
        while b"\r\n" not in self.buffered:
            data = self.sock.recv(65536)
            if not data:
                raise ConnectionResetError
            self.buffered += data
        line, self.buffered = self.buffered.split(b"\r\n", 1)
        return line

    def _chunks(self) -> Iterator[memoryview]:
        while size := int(self._line().split(b";")[0], 16):
            yield from self._exactly(size)
            self._line()
        while self._line():
            pass


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bodies = folder / "bodies"
        self.bodies.mkdir(parents=True, exist_ok=True)
        self.mutex = threading.RLock()
        self.numbers = itertools.count()
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, Upload] = {}
        for path in sorted((folder / "seed").rglob("*")):
            if path.is_file():
                key = path.relative_to(folder / "seed").as_posix()
                self.objects[key] = Stored([(path, path.stat().st_size)])

    def run(self, port: int) -> None:
        with socket.create_server(("127.0.0.1", port), backlog=512) as listener:
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=Connection(self, sock).serve, daemon=True).start()

    def answer(self, connection: Connection, request: Request) -> None:
        if request.path.startswith("/_null"):
            connection.receive(request, None)
            connection.respond("200 OK")
            return
        if request.path.startswith("/_forget"):
            self._forget()
            connection.respond("200 OK")
            return
        if request.path.startswith("/hub/"):
            self._hub(connection, request)
            return
        key = request.path.lstrip("/")
        bucket, _, name = key.partition("/")
        if not name:
            self._bucket(connection, request, bucket)
            return
        act = {
            "GET": self._get,
            "HEAD": self._get,
            "PUT": self._put,
            "POST": self._post,
            "DELETE": self._delete,
        }[request.method]
        act(connection, request, key)

    def _forget(self) -> None:
        """Remove all that was brought since the start."""
        with self.mutex:
            for key, stored in list(self.objects.items()):
                if all(path.parent == self.bodies for path, _ in stored.segments):
                    del self.objects[key]
            self.uploads.clear()
            for path in self.bodies.iterdir():
                path.unlink()

    def _error(self, connection: Connection, status: str, code: str, *, head: bool = False) -> None:
        body = f"{_XML}<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        if head:
            connection.respond(status, headers={"Content-Length": "0"})
        else:
            connection.respond(status, body, {"Content-Type": "application/xml"})

    def _xml(self, connection: Connection, text: str) -> None:
        connection.respond("200 OK", (_XML + text).encode(), {"Content-Type": "application/xml"})

    def _get(self, connection: Connection, request: Request, key: str) -> None:
        if request.method == "GET" and "uploadId" in request.query:
            self._list_parts(connection, request, key)
            return
        stored = self.objects.get(key)
        head = request.method == "HEAD"
        if stored is None:
            self._error(connection, "404 Not Found", "NoSuchKey", head=head)
            return
        wanted = request.headers.get("if-match")
        if wanted is not None and wanted != stored.etag:
            self._error(connection, "412 Precondition Failed", "PreconditionFailed", head=head)
            return
        self._send(connection, request, stored, {"ETag": stored.etag, **stored.headers}, head=head)

    def _send(
        self,
        connection: Connection,
        request: Request,
        stored: Stored,
        headers: dict[str, str],
        *,
        head: bool,
    ) -> None:
        start, end, status = 0, stored.size, "200 OK"
        headers |= {
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "Accept-Ranges": "bytes",
            "Content-Type": "binary/octet-stream",
        }
        if wanted := request.headers.get("range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first)
            end = min(end, int(last) + 1) if last else end
            if start >= stored.size:
                self._error(connection, "416 Requested Range Not Satisfiable", "InvalidRange")
                return
            status = "206 Partial Content"
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{stored.size}"
        connection.respond(status, headers={**headers, "Content-Length": str(end - start)})
        if not head:
            connection.send_files(stored.segments, start, end - start)

    def _body_path(self) -> Path:
        return self.bodies / str(next(self.numbers))

    def _put(self, connection: Connection, request: Request, key: str) -> None:
        path = self._body_path()
        size = connection.receive(request, path)
        echoed = {k: v for k, v in request.headers.items() if k.startswith("x-amz-checksum-")}
        kept = {k: v for k, v in request.headers.items() if k.startswith("x-amz-meta-")}
        new = Stored([(path, size)], {**echoed, **kept})
        with self.mutex:
            if "uploadId" in request.query:
                upload = self.uploads.get(request.query["uploadId"])
                if upload is None:
                    self._error(connection, "404 Not Found", "NoSuchUpload")
                    return
                upload.parts[int(request.query["partNumber"])] = new
            elif self._conflicts(request, key):
                self._error(connection, "412 Precondition Failed", "PreconditionFailed")
                return
            else:
                self.objects[key] = new
        connection.respond("200 OK", headers={"ETag": new.etag, **echoed})

    def _conflicts(self, request: Request, key: str) -> bool:
        current = self.objects.get(key)
        if request.headers.get("if-none-match") == "*" and current is not None:
            return True
        wanted = request.headers.get("if-match")
        return wanted is not None and (current is None or current.etag != wanted)

    def _post(self, connection: Connection, request: Request, key: str) -> None:
        bucket, _, name = key.partition("/")
        connection_body = connection.body(request)
        with self.mutex:
            if "uploads" in request.query:
                upload_id = secrets.token_hex(16)
                kept = {k: v for k, v in request.headers.items() if k.startswith("x-amz-meta-")}
                self.uploads[upload_id] = Upload(key, kept)
                self._xml(
                    connection,
                    f"<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket>"
                    f"<Key>{escape(name)}</Key><UploadId>{upload_id}</UploadId>"
                    "</InitiateMultipartUploadResult>",
                )
                return
            upload = self.uploads.get(request.query.get("uploadId", ""))
            if upload is None or not connection_body:
                self._error(connection, "404 Not Found", "NoSuchUpload")
                return
            if self._conflicts(request, key):
                self._error(connection, "412 Precondition Failed", "PreconditionFailed")
                return
            segments = [
                segment
                for number in sorted(upload.parts)
                for segment in upload.parts[number].segments
            ]
            made = self.objects[key] = Stored(segments, upload.headers)
            del self.uploads[request.query["uploadId"]]
        self._xml(
            connection,
            f"<CompleteMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{escape(name)}</Key>"
            f"<ETag>{escape(made.etag)}</ETag></CompleteMultipartUploadResult>",
        )

    def _delete(self, connection: Connection, request: Request, key: str) -> None:
        with self.mutex:
            if "uploadId" in request.query:
                self.uploads.pop(request.query["uploadId"], None)
            elif self._conflicts(request, key):
                self._error(connection, "412 Precondition Failed", "PreconditionFailed")
                return
            else:
                self.objects.pop(key, None)
        connection.respond("204 No Content")

    def _list_parts(self, connection: Connection, request: Request, key: str) -> None:
        upload = self.uploads.get(request.query["uploadId"])
        if upload is None:
            self._error(connection, "404 Not Found", "NoSuchUpload")
            return
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(part.etag)}</ETag>"
            f"<Size>{part.size}</Size></Part>"
            for number, part in sorted(upload.parts.items())
        )
        self._xml(
            connection,
            f"<ListPartsResult>{parts}<IsTruncated>false</IsTruncated></ListPartsResult>",
        )

    def _bucket(self, connection: Connection, request: Request, bucket: str) -> None:
        connection.body(request)
        if "uploads" in request.query:
            self._list_uploads(connection, request, bucket)
            return
        if request.method != "GET" or "list-type" not in request.query:
            connection.respond("200 OK")
            return
        prefix = f"{bucket}/{request.query.get('prefix', '')}"
        after = request.query.get("continuation-token", "")
        keys = sorted(key for key in list(self.objects) if key.startswith(prefix) and key > after)
        page, more = keys[:_PAGE], len(keys) > _PAGE
        contents = "".join(
            f"<Contents><Key>{escape(key.partition('/')[2])}</Key>"
            f"<Size>{self.objects[key].size}</Size><ETag>{escape(self.objects[key].etag)}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        self._xml(
            connection,
            f"<ListBucketResult><Name>{bucket}</Name><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}</ListBucketResult>",
        )

    def _list_uploads(self, connection: Connection, request: Request, bucket: str) -> None:
        prefix = f"{bucket}/{request.query.get('prefix', '')}"
        uploads = "".join(
            f"<Upload><Key>{escape(upload.key.partition('/')[2])}</Key>"
            f"<UploadId>{upload_id}</UploadId>"
            "<Initiated>2026-01-01T00:00:00.000Z</Initiated></Upload>"
            for upload_id, upload in list(self.uploads.items())
            if upload.key.startswith(prefix)
        )
        self._xml(
            connection,
            f"<ListMultipartUploadsResult><Bucket>{bucket}</Bucket>"
            f"<IsTruncated>false</IsTruncated>{uploads}</ListMultipartUploadsResult>",
        )

    def _hub(self, connection: Connection, request: Request) -> None:
        """Answer as the Hub: what a revision holds, and its files."""
        parts = request.path.removeprefix("/hub/").strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository = "/".join(parts[2:4])
            self._hub_api(connection, request, repository, parts[4:])
            return
        repository, name = "/".join(parts[:2]), "/".join(parts[4:])
        path = self.folder / "hub" / repository / name
        if not path.is_file():
            connection.respond("404 Not Found", headers={"X-Error-Code": "EntryNotFound"})
            return
        digest = _sha256(path)
        headers = {
            "ETag": f'"{digest}"',
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(path.stat().st_size),
            "X-Repo-Commit": COMMIT,
        }
        stored = Stored([(path, path.stat().st_size)])
        self._send(connection, request, stored, headers, head=request.method == "HEAD")

    def _hub_api(
        self, connection: Connection, request: Request, repository: str, rest: list[str]
    ) -> None:
        connection.body(request)
        root = self.folder / "hub" / repository
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        if not files:
            connection.respond("404 Not Found", headers={"X-Error-Code": "RepoNotFound"})
            return
        answer: object
        if rest[:1] == ["tree"]:
            answer = [_tree_entry(path, root) for path in files]
        else:
            answer = {
                "_id": "1",
                "id": repository,
                "modelId": repository,
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [
                    {
                        "rfilename": path.relative_to(root).as_posix(),
                        "size": path.stat().st_size,
                        "blobId": _tree_entry(path, root)["oid"],
                        "lfs": {
                            "sha256": _sha256(path),
                            "size": path.stat().st_size,
                            "pointerSize": 134,
                        },
                    }
                    for path in files
                ],
            }
        body = json.dumps(answer).encode()
        connection.respond("200 OK", body, {"Content-Type": "application/json"})


def _tree_entry(path: Path, root: Path) -> dict[str, object]:
    size = path.stat().st_size
    return {
        "type": "file",
        "path": path.relative_to(root).as_posix(),
        "size": size,
        "oid": hashlib.sha1(path.as_posix().encode()).hexdigest(),
        "lfs": {"oid": _sha256(path), "size": size, "pointerSize": 134},
    }


_hashes: dict[Path, str] = {}


def _sha256(path: Path) -> str:
    """Return the hash of a file of the hub; hashed once, best before anything is measured."""
    if path not in _hashes:
        with path.open("rb") as file:
            _hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[path]


if __name__ == "__main__":
    Server(Path(sys.argv[1])).run(int(sys.argv[2]))
