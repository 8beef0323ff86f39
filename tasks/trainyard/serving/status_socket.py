"""The proxy's status on a Unix socket: one line of JSON asked, one line answered.

Ask `{"environment": "staging", "model": "adder"}`; the answer is a `RouteStatus` as JSON, or `null`
for a channel that the proxy does not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from trainyard.serving.protocol import RouteStatus

_LONGEST_PATH = 100
"""Bytes. The kernel allows 108 on Linux and 104 elsewhere, a final NUL and our suffix included."""
_LONGEST_LINE = 1 << 20
_ASK_TIMEOUT_S = 5.0

Answer = Callable[[str, str], RouteStatus | None]

_status = TypeAdapter(RouteStatus)


def socket_path(wanted: Path, earlier: str | None) -> Path:
    """Return where the socket goes: `wanted`, or a short path if that is too long for a socket.

    Args:
        wanted: the path in the home.
        earlier: the path of the last start, which is used again if it still serves.
    """
    if len(os.fsencode(wanted)) <= _LONGEST_PATH:
        return wanted
    if earlier is not None and _is_ours(Path(earlier).parent):
        return Path(earlier)
    return Path(tempfile.mkdtemp(prefix="trainyard-")) / "proxy.sock"


def forget_socket(path: Path, wanted: Path) -> None:
    """Remove the socket, and the folder that was made for it if it is not at `wanted`."""
    path.unlink(missing_ok=True)
    if path != wanted:
        shutil.rmtree(path.parent, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return folder.is_dir() and found.st_uid == os.getuid() and found.st_mode & 0o077 == 0


def bind(path: Path) -> socket.socket:
    """Return a listening socket at `path` that only this user can reach; replaces an old one."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(temporary))
        # Before anybody can connect: nobody knows the temporary name, and nothing listens yet.
        temporary.chmod(0o600)
        sock.listen()
        temporary.replace(path)
    except BaseException:
        sock.close()
        raise
    return sock


async def serve(sock: socket.socket, answer: Answer) -> asyncio.Server:
    """Answer on `sock` until the returned server is closed."""
    return await asyncio.start_unix_server(_handler(answer), sock=sock, limit=_LONGEST_LINE)


def _handler(
    answer: Answer,
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError, KeyError, TypeError):
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                asked: Any = json.loads(await reader.readline())
                status = answer(str(asked["environment"]), str(asked["model"]))
                reply = None if status is None else asdict(status)
                writer.write(json.dumps(reply).encode() + b"\n")
                await writer.drain()
        writer.close()

    return handle


def ask(path: str, environment: str, model: str, *, timeout_s: float) -> RouteStatus | None:
    """Return the status of a channel's route, or None if the proxy does not know the channel.

    Raises:
        OSError: nobody answers (in time).
        ValueError: the answer makes no sense.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        sock.connect(path)
        question = json.dumps({"environment": environment, "model": model})
        sock.sendall(question.encode() + b"\n")
        with sock.makefile("rb") as stream:
            line = stream.readline(_LONGEST_LINE)
    value = json.loads(line)
    return None if value is None else _status.validate_python(value)
