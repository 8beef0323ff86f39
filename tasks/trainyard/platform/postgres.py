"""PostgreSQL for Airflow's metadata: Debian's server, a Unix socket, nothing on the network."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import time
from pathlib import Path

from trainyard.errors import BadInput, Transient
from trainyard.platform.paths import PlatformPaths

DATABASE = "airflow"
START_TIMEOUT_S = 60.0


def binaries() -> Path:
    """Return the folder with PostgreSQL's server programs, of the newest version installed.

    Raises:
        BadInput: there is none.
    """

    def version(folder: Path) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", folder.parent.name))

    debian = [p.parent for p in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if debian:
        return max(debian, key=version)
    found = shutil.which("postgres")
    if found:
        return Path(found).resolve().parent
    raise BadInput(
        "PostgreSQL's server is not installed.",
        hint="Run `apt-get install postgresql` as root, or set TRAINYARD_AIRFLOW_DATABASE=sqlite "
        "(slower, and it fails under concurrent API calls).",
    )


def as_server_user(argv: list[str]) -> list[str]:
    """Return `argv` wrapped so that root runs it as the user `postgres`."""
    if os.geteuid() != 0:
        return argv
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", *argv]


def initialise(paths: PlatformPaths) -> None:
    """Create the cluster unless it exists; a half-made one is made anew."""
    cluster = paths.postgres / "data"
    if (cluster / "PG_VERSION").exists():
        return
    sockets = paths.postgres / "socket"
    for folder in (paths.postgres, sockets):
        folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            owner = _server_owner()
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        folder.chmod(0o700)
    fresh = paths.postgres / "data.new"
    shutil.rmtree(fresh, ignore_errors=True)
    argv = [
        str(binaries() / "initdb"),
        f"--pgdata={fresh}",
        "--username=airflow",
        "--encoding=UTF8",
        "--locale=C.UTF-8",
        # Only this user (and root) can enter the socket's folder, so the socket needs no password.
        "--auth-local=trust",
        "--auth-host=reject",
    ]
    done = subprocess.run(
        as_server_user(argv), cwd=paths.postgres, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Transient(
            f"PostgreSQL's initdb failed in {fresh}: {done.stderr.strip()[-500:]}",
            hint="See whether the disk is full or the folder is writable.",
        )
    fresh.rename(cluster)


def _server_owner() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        raise BadInput(
            "Root cannot run PostgreSQL, and the user `postgres` does not exist.",
            hint="Install Debian's package postgresql, or run Trainyard as an ordinary user.",
        ) from None


def server_argv(paths: PlatformPaths) -> list[str]:
    """Return the command that runs the server in the foreground."""
    options = {
        "listen_addresses": "",
        "unix_socket_directories": str(paths.postgres / "socket"),
        "shared_buffers": "64MB",
        "max_connections": "200",
        "logging_collector": "off",
    }
    argv = [str(binaries() / "postgres"), "-D", str(paths.postgres / "data")]
    for name, value in options.items():
        argv += ["-c", f"{name}={value}"]
    return as_server_user(argv)


def url(paths: PlatformPaths, driver: str) -> str:
    """Return the SQLAlchemy URL of the metadata database."""
    return f"postgresql+{driver}://airflow@/{DATABASE}?host={paths.postgres / 'socket'}"


def ensure_database(paths: PlatformPaths) -> None:
    """Wait for the server and create the database unless it exists.

    Raises:
        Transient: the server does not answer in time.
    """
    import psycopg2
    from psycopg2 import errors

    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            connection = psycopg2.connect(
                host=str(paths.postgres / "socket"), user="airflow", dbname="postgres"
            )
            break
        except psycopg2.OperationalError as error:
            if time.monotonic() > deadline:
                raise Transient(
                    f"PostgreSQL did not answer within {START_TIMEOUT_S:.0f} s: {error}",
                    hint=f"Read {paths.logs / 'postgres.log'}.",
                ) from error
            time.sleep(0.1)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {DATABASE}")
    except errors.DuplicateDatabase:
        return
    finally:
        connection.close()
