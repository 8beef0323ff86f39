"""Several processes at once, and processes that are killed between any two system calls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainyard.store.folder import FolderStore

PROCESSES = 4
TURNS = 25

COUNT = """
import sys
from pathlib import Path
from trainyard.errors import Conflict
from trainyard.store.folder import FolderStore

store = FolderStore(Path(sys.argv[1]))
sys.stdin.read()
for _ in range(int(sys.argv[2])):
    while True:
        stored = store.read("counter")
        try:
            store.replace("counter", b"%d" % (int(stored.data) + 1), version=stored.version)
            break
        except Conflict:
            pass
"""

CREATE = """
import sys
from pathlib import Path
from trainyard.errors import Conflict
from trainyard.store.folder import FolderStore

store = FolderStore(Path(sys.argv[1]))
sys.stdin.read()
for turn in range(int(sys.argv[2])):
    try:
        store.create(f"made/{turn}", sys.argv[3].encode())
        print(turn)
    except Conflict:
        pass
    store.create(f"own/{turn}/{sys.argv[3]}", b"")
    store.delete(f"own/{turn}/{sys.argv[3]}")
"""

CRASH = """
import io, itertools, json, os, sys
from pathlib import Path
from trainyard.store.folder import FolderStore

root = Path(sys.argv[1])
CALLS = ["open", "write", "fsync", "link", "replace", "unlink", "mkdir", "close", "rmdir"]
OLD, NEW = b"old", b"new" * 1000

def version(data):
    import hashlib
    return hashlib.sha256(data).hexdigest()

OPERATIONS = {
    "create": (None, NEW, lambda store: store.create("x/key", NEW)),
    "upload": (None, NEW, lambda store: store.upload("x/key", io.BytesIO(NEW))),
    "put": (OLD, NEW, lambda store: store.put("x/key", NEW)),
    "put anew": (None, NEW, lambda store: store.put("x/key", NEW)),
    "replace": (OLD, NEW, lambda store: store.replace("x/key", NEW, version=version(OLD))),
    "delete": (OLD, None, lambda store: store.delete("x/key")),
}

def seen(store):
    return store.read("x/key").data if store.exists("x/key") else None

def crash_at(number, operation, folder):
    pid = os.fork()
    if pid == 0:
        left = itertools.count(number, -1)
        def dying(call):
            def wrapped(*args, **kwargs):
                if next(left) == 0:
                    os._exit(9)
                return call(*args, **kwargs)
            return wrapped
        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        operation(FolderStore(folder))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

report = {}
for name, (before, after, operation) in OPERATIONS.items():
    outcomes = []
    for number in itertools.count():
        folder = root / f"{name}-{number}"
        store = FolderStore(folder)
        if before is not None:
            store.create("x/key", before)
        code = crash_at(number, operation, folder)
        found = seen(store)
        listed = [(entry.key, entry.size) for entry in store.list("")]
        FolderStore(folder).put("another", b"")
        outcomes.append({
            "finished": code == 0,
            "state": "before" if found == before else "after" if found == after else "broken",
            "listed": listed == ([] if found is None else [("x/key", len(found))]),
            "left": len(list((folder / ".trainyard" / "tmp").iterdir())),
        })
        if code == 0:
            break
        assert code == 9, code
    report[name] = outcomes
print(json.dumps(report))
"""


def start(script: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def race(script: str, *args: object, with_names: bool = False) -> list[str]:
    """Run several processes at once and return what they print."""
    extra = [[str(n)] if with_names else [] for n in range(PROCESSES)]
    processes = [start(script, *args, *names) for names in extra]
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * PROCESSES
    return outputs


def test_no_change_is_lost_between_processes(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.create("counter", b"0")
    race(COUNT, tmp_path, TURNS)
    assert store.read("counter").data == b"%d" % (PROCESSES * TURNS)


def test_each_key_is_created_by_one_process(tmp_path: Path) -> None:
    made = race(CREATE, tmp_path, TURNS, with_names=True)
    turns = [turn for output in made for turn in output.split()]
    assert sorted(turns, key=int) == [str(turn) for turn in range(TURNS)]
    store = FolderStore(tmp_path)
    for name, output in enumerate(made):
        for turn in output.split():
            assert store.read(f"made/{turn}").data == str(name).encode()
    assert list(store.list("own")) == []


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    root = tmp_path_factory.mktemp("crashes")
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(root)],
        check=True,
        stdout=subprocess.PIPE,
        timeout=200,
    )
    report: dict[str, list[dict[str, object]]] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("operation", ["create", "upload", "put", "put anew", "replace", "delete"])
def test_a_kill_at_any_system_call_leaves_all_or_nothing(
    crashes: dict[str, list[dict[str, object]]], operation: str
) -> None:
    outcomes = crashes[operation]
    assert len(outcomes) > 5
    states = [outcome["state"] for outcome in outcomes]
    assert set(states) == {"before", "after"}
    assert states == sorted(states, key=["before", "after"].index)
    assert all(outcome["listed"] for outcome in outcomes)
    assert outcomes[-1]["finished"]


@pytest.mark.parametrize("operation", ["create", "upload", "put", "put anew", "replace", "delete"])
def test_the_next_writer_cleans_up(
    crashes: dict[str, list[dict[str, object]]], operation: str
) -> None:
    assert [outcome["left"] for outcome in crashes[operation]] == [0] * len(crashes[operation])
