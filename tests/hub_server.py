"""A server of ours that speaks the Hugging Face Hub's protocol for models, with faults on demand.

It has what huggingface_hub and Trainyard use to read a model: `GET /api/models/…` with the hashes
of all files, the listing as a tree, and `/resolve/…` with the Hub's headers, redirects and error
codes. Large files (LFS) are on a second origin, as on the Hub, to which no token may be sent.
`tests/integration/test_hub_protocol.py` drives the real huggingface_hub against it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

POINTER_BYTES = 134
"""Size of the text that git keeps in place of a large file."""


def blob_id(content: bytes) -> str:
    """Return git's object id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Seen:
    """One request."""

    method: str
    path: str
    origin: str
    """`hub` or `cdn`."""
    range: str | None
    token: str | None


@dataclass
class Fault:
    """What happens to the next requests whose path (with the query) matches."""

    pattern: str
    times: int
    status: int = 0
    """Answered instead, if it is not 0."""
    headers: Mapping[str, str] = field(default_factory=dict)
    stall_s: float = 0
    """Seconds without an answer."""
    cut_after: int | None = None
    """Bytes of the body after which the connection is closed."""


@dataclass
class Repo:
    """One model."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    """Branches and tags; `main` is the default branch."""
    large: frozenset[str] = frozenset()
    """Paths that are stored as LFS objects."""
    private: bool = False
    gated: bool = False
    readers: frozenset[str] = frozenset()
    """Tokens that may read a private or gated model."""


class HubServer:
    """The server; a context manager that leaves nothing running."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        """Those that belong to somebody."""
        self.wrong_bytes: dict[str, bytes] = {}
        """What is really served for a path."""
        self.ignores_ranges = False
        self.names: dict[str, str] = {}
        """What a path is called in listings."""
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.served_bytes = 0
        self.latency_s = 0.0
        """Seconds before every answer."""
        self.most_at_once = 0
        """Requests that were being answered at the same time."""
        self._at_once = 0
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._servers = [self._serve("hub"), self._serve("cdn")]
        ports = [server.server_address[1] for server in self._servers]
        self.url = f"http://127.0.0.1:{ports[0]}"
        self.cdn_url = f"http://127.0.0.1:{ports[1]}"

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes] | Path,
        *,
        ref: str = "main",
        large: tuple[str, ...] = ("*.safetensors",),
        **rights: Any,
    ) -> str:
        """Commit files to a model, set the branch or tag, and return the commit."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        found = self.repos.setdefault(repo, Repo())
        for name, value in rights.items():
            setattr(found, name, value)
        names = sorted((path, blob_id(content)) for path, content in files.items())
        commit = hashlib.sha1(repr((repo, len(found.commits), names)).encode()).hexdigest()
        found.commits[commit] = dict(files)
        found.refs[ref] = commit
        found.large |= {path for path in files if any(Path(path).match(p) for p in large)}
        return commit

    def fail(self, pattern: str, *, times: int = 1, **how: Any) -> None:
        """Let the next requests whose path matches the regular expression go wrong."""
        self.faults.append(Fault(pattern, times, **how))

    def requests(self, pattern: str = "", *, origin: str = "") -> list[Seen]:
        """Return the requests so far whose path matches."""
        return [s for s in self.seen if re.search(pattern, s.path) and origin in ("", s.origin)]

    def _serve(self, origin: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "origin": origin})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return server

    def note(self, seen: Seen) -> Fault | None:
        """Record a request and return what shall happen to it."""
        with self._mutex:
            self.seen.append(seen)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, seen.path):
                    fault.times -= 1
                    return fault
        return None

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request that is being answered, and let it take its time."""
        with self._mutex:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.latency_s:
                self.stall(self.latency_s)
            yield
        finally:
            with self._mutex:
                self._at_once -= 1

    def count(self, size: int) -> None:
        """Count bytes of file contents that were sent."""
        with self._mutex:
            self.served_bytes += size

    def stall(self, seconds: float) -> None:
        """Wait, but not beyond the end of the server."""
        self._ended.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about clients that have gone; anything else is a defect of this server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status)
        self.status = status
        self.code = code
        self.message = message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer
    origin: str

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output readable."""

    def do_HEAD(self) -> None:
        with self.hub.answering():
            self._answer()

    def do_GET(self) -> None:
        with self.hub.answering():
            self._answer()

    def _answer(self) -> None:
        authorization = self.headers.get("Authorization")
        self.token = authorization.removeprefix("Bearer ") if authorization else None
        self.cut_after: int | None = None
        fault = self.hub.note(
            Seen(self.command, self.path, self.origin, self.headers.get("Range"), self.token)
        )
        try:
            if fault is not None:
                self.cut_after = fault.cut_after
                if fault.stall_s:
                    self.hub.stall(fault.stall_s)
                if fault.status:
                    return self._send(fault.status, b"", dict(fault.headers))
            self._route()
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            if refused.message:
                headers["X-Error-Message"] = refused.message
            body = json.dumps({"error": refused.message or refused.code}).encode()
            self._send(refused.status, body, {**headers, "Content-Type": "application/json"})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if self.origin == "cdn":
            return self._cdn(path, parse_qs(url.query))
        if found := re.fullmatch(r"/api/resolve-cache/models/(.+?)/([0-9a-f]{40})/(.+)", path):
            return self._content(self._repo(found[1]).commits[found[2]][found[3]], found[3])
        if found := re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)", path):
            return self._tree(found[1], found[2])
        # The revision is one quoted segment, whatever is in it.
        if found := re.fullmatch(r"/api/models/(.+?)(?:/revision/([^/]+))?", url.path):
            return self._info(unquote(found[1]), unquote(found[2]) if found[2] else None)
        if found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", url.path):
            return self._resolve(*map(unquote, found.groups()))
        raise _Refused(404)

    def _repo(self, name: str) -> Repo:
        if self.token is not None and self.token not in self.hub.tokens:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token not in repo.readers):
            # Without a token the Hub does not tell whether there is such a model.
            raise _Refused(
                401 if self.token is None else 404, "RepoNotFound", "Repository not found"
            )
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _info(self, name: str, revision: str | None) -> None:
        repo = self._repo(name)
        commit = self._commit(repo, revision or "main")
        with_blobs = "blobs=" in self.path
        siblings = []
        for path, content in repo.commits[commit].items():
            sibling: dict[str, Any] = {"rfilename": self.hub.names.get(path, path)}
            if with_blobs:
                sibling |= {"size": len(content), "blobId": blob_id(content)}
                if path in repo.large:
                    sibling["lfs"] = {
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": POINTER_BYTES,
                    }
            siblings.append(sibling)
        info = {
            "_id": "0" * 24,
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        files = repo.commits[self._commit(repo, revision)]
        entries = []
        for path, content in files.items():
            entry: dict[str, Any] = {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": blob_id(content),
            }
            if path in repo.large:
                entry["lfs"] = {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": POINTER_BYTES,
                }
            entries.append(entry)
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        commit = self._commit(repo, revision)
        if repo.gated and self.token not in repo.readers:
            raise _Refused(
                401 if self.token is None else 403,
                "GatedRepo",
                f"Access to model {name} is restricted and you are not in the authorized list.",
            )
        content = repo.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        if path not in repo.large:
            headers |= {
                "Location": f"/api/resolve-cache/models/{name}/{commit}/{path}",
                "ETag": f'"{blob_id(content)}"',
                "X-Linked-Size": str(len(content)),
            }
            return self._send(307, b"", headers)
        sha256 = hashlib.sha256(content).hexdigest()
        headers |= {
            "Location": f"{self.hub.cdn_url}/{name}/{sha256}/{path}?Signature=opens-it&repo={name}",
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(len(content)),
        }
        return self._send(302, b"", headers)

    def _cdn(self, path: str, query: Mapping[str, list[str]]) -> None:
        if query.get("Signature") != ["opens-it"]:
            raise _Refused(403)
        name = query["repo"][0]
        sha256, _, file = path.removeprefix(f"/{name}/").partition("/")
        for files in self.hub.repos[name].commits.values():
            content = files.get(file)
            if content is not None and hashlib.sha256(content).hexdigest() == sha256:
                return self._content(content, file)
        raise _Refused(404)

    def _content(self, content: bytes, path: str) -> None:
        etag = blob_id(content)
        content = self.hub.wrong_bytes.get(path, content)
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.origin == "hub":
            headers["X-Repo-Commit"] = self.path.split("/")[-2]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or self.hub.ignores_ranges:
            return self._send(200, content, headers, counted=True)
        first = int(wanted[1])
        last = min(int(wanted[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, content[first : last + 1], headers, counted=True)

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], *, counted: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut_after is not None:
            body = body[: self.cut_after]
            self.close_connection = True
        # Before the client has it, so that whoever has read it finds it counted.
        if counted:
            self.hub.count(len(body))
        self.wfile.write(body)
        if self.cut_after is not None:
            self.wfile.flush()
            # What was sent arrives before the end does.
            time.sleep(0.01)
            self.connection.shutdown(socket.SHUT_RDWR)
