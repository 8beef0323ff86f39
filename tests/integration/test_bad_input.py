"""Bad input at the real command line: it says what is wrong and where, and nothing is lost or made.

One home is used by all tests, with one checkpoint that was stored before. Each test does something
wrong in it and finds it as it was: the same artifacts with the same contents, and no new ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.unit.sources.model_files import safetensors, write_model

from trainyard.documents.artifacts import CheckpointManifest
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import checkpoint_manifest_key, checkpoint_prefix

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]
FILES = REPOSITORY / "tests" / "unit" / "spec" / "files"
SERVE_PYTHON = REPOSITORY / ".venv-serve" / "bin" / "python"

BOOKKEEPING = ("status/", "locks/")
"""What a refused step may leave: that it was tried, and its lock, free again."""

BAD_INPUT, TRANSIENT, BUSY = 10, 30, 75
MIB = 1 << 20


@dataclass(frozen=True)
class Yard:
    """A home, and the command line in it."""

    home: Path
    catalogue: Path

    @property
    def store(self) -> FolderStore:
        return FolderStore(self.home / "store")

    @property
    def models(self) -> Path:
        """Where the revisions of the model are."""
        return self.home / "demo" / "models" / "adder"

    def environment(self, **settings: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "TRAINYARD_HOME": str(self.home),
            "TRAINYARD_CATALOGUE": str(self.catalogue),
            "TRAINYARD_ENVIRONMENTS": str(FILES / "environments.yaml"),
            "TRAINYARD_SERVE_PYTHON": str(SERVE_PYTHON),
            **settings,
        }

    def run(self, *arguments: str, **settings: str) -> Ended:
        """Run `trainyard` as a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "trainyard", *arguments],
            env=self.environment(**settings),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        return Ended(done.returncode, done.stdout + done.stderr)

    def artifacts(self) -> dict[str, str]:
        """Return the hash of everything in the store that counts, by key."""
        found = {}
        for entry in self.store.list(""):
            if not entry.key.startswith(BOOKKEEPING):
                with self.store.open(entry.key) as stream:
                    found[entry.key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return found

    def leftovers(self) -> list[Path]:
        """Return the temporary files below the store."""
        return list((self.home / "store" / ".trainyard" / "tmp").glob("*"))


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str

    @property
    def flat(self) -> str:
        """The output without line breaks."""
        return " ".join(self.output.split())

    def says(self, *words: str) -> None:
        """Demand these words, and that it ended in words and not in a trace."""
        for each in words:
            assert each in self.flat, self.output
        assert "Traceback" not in self.output, self.output


def make_yard(folder: Path) -> Yard:
    """Return a home whose store holds revision r1."""
    yard = Yard(folder / "home", folder / "models")
    yard.home.mkdir()
    shutil.copytree(FILES / "models", yard.catalogue)
    write_model(yard.models / "r1")
    for arguments in (["plan", "--model", "adder", "--plan", "good"], ["download", "--plan=good"]):
        done = yard.run(*arguments)
        assert done.code == 0, done.output
    return yard


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Yard:
    """A home for all tests that must not change it."""
    return make_yard(tmp_path_factory.mktemp("bad-input"))


@pytest.fixture
def yard(shared: Yard) -> Iterator[Yard]:
    """The shared home; the test must leave its artifacts as they were."""
    before = shared.artifacts()
    assert checkpoint_manifest_key("adder", "r1") in before
    yield shared
    assert shared.artifacts() == before
    assert shared.leftovers() == []


# --- specs ----------------------------------------------------------------------------------------

MISTAKES = """\
schema: trainyard/v2
model: Broken
source: {kind: local, path: "${HOME}/models"}
targets:
  - name: cpu
    lane: gpu
    max_modell_len: 256
  - name: second
    lane: cpu
    max_num_seqs: "16"
gates:
  accuracy:
    tasks:
      - {name: addition, path: ../addition.yaml, min: 95}
  latency:
    levels:
      - name: one
        max_concurrency: 8
        num_prompts: 4
        input_len: 16
        output_len: 16
        bounds:
          ttft_p98_ms: {max: 1}
rollout:
  on_undecided: wait
"""

PLACES = (
    (1, "schema"),
    (1, "owner"),
    (2, "model"),
    (3, "source.path"),
    (6, "targets[0].lane"),
    (7, "targets[0].max_modell_len"),
    (10, "targets[1].max_num_seqs"),
    (14, "gates.accuracy.tasks[0].path"),
    (14, "gates.accuracy.tasks[0].min"),
    (19, "gates.latency.levels[0].num_prompts"),
    (23, "gates.latency.levels[0].bounds.ttft_p98_ms"),
    (25, "rollout.on_undecided"),
)


def test_every_mistake_of_a_spec_is_named_with_its_line(yard: Yard, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(MISTAKES)
    done = yard.run("check", str(path))
    assert done.code == BAD_INPUT
    for line, key in PLACES:
        assert f"{path}:{line} {key}: " in done.output
    done.says(f"{len(PLACES)} problems.")


def test_a_release_of_a_broken_spec_is_refused_with_every_mistake(
    yard: Yard, tmp_path: Path
) -> None:
    (tmp_path / "broken.yaml").write_text(MISTAKES)
    done = yard.run("plan", "--model", "broken", TRAINYARD_CATALOGUE=str(tmp_path))
    assert done.code == BAD_INPUT
    done.says(f"has {len(PLACES)} problems", *(key for _, key in PLACES))


def test_what_is_no_yaml_is_refused_with_its_line(yard: Yard, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("schema: trainyard/v1\nmodel: [broken\n")
    done = yard.run("check", str(path))
    assert done.code == BAD_INPUT
    done.says(f"{path}:3: This is not valid YAML")


# --- sources --------------------------------------------------------------------------------------


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-5])


def no_model_at_all(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>404 Not Found</html>")


def with_code(folder: Path) -> None:
    (folder / "modeling_adder.py").write_text("import os\n")


def linked_outside(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/hostname")


def all_at_once(folder: Path) -> None:
    without_config(folder)
    truncated(folder)
    with_code(folder)
    (folder / "old.ckpt").write_bytes(b"\x80\x04")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_config, ["config.json is missing"]),
        (pickled, ["pickle files are never loaded (pytorch_model.bin)", "safe_serialization"]),
        (truncated, ["model.safetensors is truncated", "copy or export the file again"]),
        (no_model_at_all, ["model.safetensors is not a safetensors file"]),
        (with_code, ["code is never loaded (modeling_adder.py)"]),
        (linked_outside, ["tokenizer.json is a symbolic link out of the folder"]),
        (
            all_at_once,
            [
                "config.json is missing",
                "is truncated",
                "(modeling_adder.py)",
                "(old.ckpt)",
                "Correct all 4 problems",
            ],
        ),
    ],
)
def test_a_broken_source_is_refused_while_planning(
    yard: Yard, spoil: Any, words: list[str]
) -> None:
    folder = write_model(yard.models / f"broken-{spoil.__name__.replace('_', '-')}")
    spoil(folder)
    done = yard.run("plan", "--model", "adder", "--revision", folder.name)
    assert done.code == BAD_INPUT
    done.says("plan failed (exit 10)", folder.name, *words)


def test_a_source_that_changed_after_the_plan_is_not_stored(yard: Yard) -> None:
    """The plan is withdrawn afterwards: it is what the test adds."""
    folder = write_model(yard.models / "changing")
    planned = yard.run("plan", "--model=adder", "--revision=changing", "--plan=changing")
    try:
        assert planned.code == 0, planned.output
        write_model(folder, fill=7)
        done = yard.run("download", "--plan", "changing")
        assert done.code == BAD_INPUT
        done.says("changed since the plan was made", "Plan again")
        assert list(yard.store.list(checkpoint_prefix("adder", "changing"))) == []
    finally:
        yard.store.delete("plans/changing.json")


def test_other_weights_under_a_known_revision_are_refused(yard: Yard) -> None:
    folder = yard.models / "r1"
    original = (folder / "model.safetensors").read_bytes()
    try:
        (folder / "model.safetensors").write_bytes(safetensors({"embed": [2, 4], "norm": [5]}))
        done = yard.run("plan", "--model", "adder", "--revision", "r1")
    finally:
        (folder / "model.safetensors").write_bytes(original)
    assert done.code == BAD_INPUT
    done.says("Revision 'r1' of adder is in the store with other files", "A revision never changes")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--model", "../adder"], ["Model '../adder' is not a valid name."]),
        (["plan", "--model", "adder/../adder"], ["is not a valid name"]),
        (["plan", "--request", '{"model": "../adder"}'], ["Model '../adder' is not a valid name."]),
        (["plan", "--request", '{"model": "/etc/passwd"}'], ["is not a valid name"]),
        (["releases", "../adder"], ["Model '../adder' is not a valid name."]),
        (["channel", "adder", "../production"], ["'../production' is not a valid name."]),
        (["status", "../good"], ["'../good' is not a valid name"]),
        (["download", "--plan", "../good"], ["'../good' is not valid"]),
        (["plan", "--model=adder", "--plan=../x"], ["'../x' is not valid"]),
        (["plan", "--model=adder", "--revision=../r1"], ["Revision '../r1' is not valid."]),
        (["compile", "--plan=good", "--target=../cpu"], ["'../cpu'"]),
    ],
)
def test_names_that_would_leave_their_folder_are_refused(
    yard: Yard, arguments: list[str], words: list[str]
) -> None:
    files = {path for path in yard.home.parent.rglob("*") if "store" not in path.parts}
    done = yard.run(*arguments)
    assert done.code == BAD_INPUT
    done.says(*words)
    now = {path for path in yard.home.parent.rglob("*") if "store" not in path.parts}
    assert {path for path in now - files if path.is_file()} == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--model", "ader"], ["There is no model 'ader'", "Did you mean adder?"]),
        (["plan", "--model=adder", "--revision=r9"], ["r9", "r1"]),
        (["plan", "--model=adder", "--environment=moon"], ["moon", "production"]),
        (
            ["plan", "--request", '{"model": "adder", "targets": ["trn9"]}'],
            ["trn9", "cpu"],
        ),
        (
            ["plan", "--request", '{"model": "adder", "overrides": {"max_num_seq": 4}}'],
            ["max_num_seq", "max_num_seqs"],
        ),
        (["plan", "--request", '{"model": "adder", "overides": {}}'], ["overides"]),
        (["plan", "--request", '{"model": '], ["The request is not valid"]),
        (["releases", "ader"], ["There is no model 'ader'"]),
        (["channel", "ader", "production"], ["There is no model 'ader'"]),
        (["channel", "adder", "moon"], ["There is no environment 'moon'", "production"]),
        (["status", "nothing"], ["nothing has no channel, and no step of a plan"]),
        (["download", "--plan", "nothing"], ["plans/nothing.json does not exist"]),
        (["compile", "--plan=good", "--target=trn9"], ["trn9", "cpu"]),
        (["measure", "--plan=good", "--target=trn9"], ["trn9", "cpu"]),
        (["gate", "--plan=good", "--target=trn9", "--gate=accuracy"], ["trn9", "cpu"]),
        (["publish", "--plan=good", "--target=trn9"], ["trn9", "cpu"]),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(
    yard: Yard, arguments: list[str], words: list[str]
) -> None:
    done = yard.run(*arguments)
    assert done.code == BAD_INPUT
    done.says(*words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["gate", "--plan=good", "--target=cpu", "--gate=accuracy"],
        ["gate", "--plan=good", "--target=cpu", "--gate=latency"],
        ["publish", "--plan=good", "--target=cpu"],
    ],
)
def test_a_step_before_its_turn_says_what_is_missing(yard: Yard, arguments: list[str]) -> None:
    done = yard.run(*arguments)
    assert done.code == BAD_INPUT
    done.says("There is no measurement", "run the step `measure` first")


def test_an_unknown_gate_is_a_mistake_in_the_call(yard: Yard) -> None:
    done = yard.run("gate", "--plan=good", "--target=cpu", "--gate=beauty")
    assert done.code == 2
    done.says("beauty", "accuracy", "latency")


# --- a full disk ----------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Give `folder` a file system of its own of `size` bytes; False where that is not allowed."""
    folder.mkdir(parents=True)
    mounted = os.geteuid() == 0 and (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def run_limited(yard: Yard, limit: int, *arguments: str) -> Ended:
    """Run `trainyard` with a limit on the size of each file, which acts like a full disk."""
    program = (
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))\n"
        "sys.argv[0] = 'trainyard'\n"
        "runpy.run_module('trainyard', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=yard.environment(),
        cwd=yard.home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Ended(done.returncode, done.stdout + done.stderr)


def big_model(yard: Yard) -> None:
    """Add a revision `big` with two weight files of 3 MiB, and plan its release."""
    folder = write_model(yard.models / "big")
    (folder / "model.safetensors").unlink()
    names = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        tensor = f"embed{number}"
        (folder / name).write_bytes(safetensors({tensor: [3 * MIB // 4]}, fill=number))
        names[tensor] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    done = yard.run("plan", "--model=adder", "--revision=big", "--plan=big")
    assert done.code == 0, done.output


def check_refused_for_room(yard: Yard, done: Ended, before: Mapping[str, str]) -> None:
    assert done.code == TRANSIENT, done.output
    done.says("download failed (exit 30)", "Free space")
    after = yard.artifacts()
    assert checkpoint_manifest_key("adder", "big") not in after
    assert {key: after[key] for key in before} == before
    # A file that is there is whole: it can be kept by the next attempt.
    prefix = checkpoint_prefix("adder", "big")
    for key in set(after) - set(before):
        source = yard.models / "big" / key.removeprefix(f"{prefix}/")
        assert after[key] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert yard.leftovers() == []


def check_stored(yard: Yard, done: Ended, before: Mapping[str, str]) -> None:
    assert done.code == 0, done.output
    manifest = read_document(
        yard.store, checkpoint_manifest_key("adder", "big"), CheckpointManifest
    )
    after = yard.artifacts()
    for file in manifest.files:
        assert after[f"{checkpoint_prefix('adder', 'big')}/{file.path}"] == file.sha256
    assert len(manifest.files) == 5
    assert {key: after[key] for key in before} == before


def test_a_full_disk_stops_a_download_that_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """On a real file system of 8 MiB where that can be made, else under a limit on file sizes."""
    with small_disk(tmp_path / "home" / "store", 8 * MIB) as mounted:
        yard = Yard(tmp_path / "home", tmp_path / "models")
        shutil.copytree(FILES / "models", yard.catalogue)
        write_model(yard.models / "r1")
        for arguments in (["plan", "--model=adder", "--plan=good"], ["download", "--plan=good"]):
            assert yard.run(*arguments).code == 0
        big_model(yard)
        before = yard.artifacts()
        if mounted:
            ballast = yard.home / "store" / "ballast"
            ballast.write_bytes(b"\0" * (4 * MIB))
            before = yard.artifacts()
            check_refused_for_room(yard, yard.run("download", "--plan=big"), before)
            ballast.unlink()
            del before["ballast"]
        else:
            check_refused_for_room(yard, run_limited(yard, MIB, "download", "--plan=big"), before)
        check_stored(yard, yard.run("download", "--plan=big"), before)


def test_a_limit_on_file_sizes_is_told_like_a_full_disk(tmp_path: Path) -> None:
    yard = make_yard(tmp_path)
    big_model(yard)
    before = yard.artifacts()
    check_refused_for_room(yard, run_limited(yard, MIB, "download", "--plan=big"), before)
    check_stored(yard, yard.run("download", "--plan=big"), before)


def test_a_disk_without_any_room_is_told_too(tmp_path: Path) -> None:
    """Not even the lock of the step can be written."""
    yard = make_yard(tmp_path)
    big_model(yard)
    before = yard.artifacts()
    check_refused_for_room(yard, run_limited(yard, 0, "download", "--plan=big"), before)
    check_stored(yard, yard.run("download", "--plan=big"), before)


# --- ports ----------------------------------------------------------------------------------------


def test_a_proxy_whose_port_is_taken_says_which(yard: Yard) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = yard.run("proxy", TRAINYARD_PROXY_PORT=str(port))
    assert done.code == BAD_INPUT
    done.says(f"Port {port} of 127.0.0.1 is taken", "TRAINYARD_PROXY_PORT")
    assert not (yard.home / "run" / "proxy.json").exists()


@pytest.mark.parametrize("name", ["proxy", "agent"])
def test_a_second_one_of_a_home_is_refused(yard: Yard, name: str) -> None:
    log = yard.home / f"{name}.log"
    with log.open("wb") as stream:
        first = subprocess.Popen(
            [sys.executable, "-m", "trainyard", name],
            env=yard.environment(),
            cwd=yard.home,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    try:
        lock = yard.home / "run" / f"{name}.lock"
        deadline = time.monotonic() + 60
        while not (lock.exists() and lock.read_text() == str(first.pid)):
            assert first.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        done = yard.run(name)
        assert done.code == BUSY
        done.says(f"Another {name} already runs for this home (pid {first.pid}).")
        assert first.poll() is None
    finally:
        first.terminate()
        first.wait(timeout=600)
