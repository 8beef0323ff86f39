"""A lane whose server starts in a moment, for tests of the steps that start one."""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit import yard

from trainyard.documents.artifacts import CheckpointManifest, files_digest
from trainyard.documents.base import FileEntry
from trainyard.documents.plan import Plan
from trainyard.lanes.cpu import CpuLane
from trainyard.lanes.protocol import ServerCommand
from trainyard.settings import Settings
from trainyard.spec.model import Target
from trainyard.steps.context import StepContext
from trainyard.store.documents import create_document
from trainyard.store.layout import checkpoint_manifest_key, checkpoint_prefix

TOOLCHAIN = {"vllm": "0.32.0"}

_SERVER = """
    import http.server, json, os, pathlib, sys, time

    port, cache, model, behaviour = int(sys.argv[1]), pathlib.Path(sys.argv[2]), *sys.argv[3:]
    weights = pathlib.Path(model, "model.safetensors").read_bytes()
    if behaviour == "broken":
        raise KeyError("lm_head.weight")
    if behaviour == "port" and not os.path.exists("second"):
        open("second", "w").close()
        raise OSError(98, "Address already in use")
    print("Warming up model for the compilation", flush=True)
    files = {"ab/cab.cpp": b"code", "ab/cab.so": b"\\x7fELF", "fxgraph/4e/f4e/p": b"graph"}
    if behaviour == "misses":
        files["xy/cxy.cpp"], files["xy/cxy.so"] = b"more", b"\\x7fELF"
    if behaviour == "compiles nothing":
        files = {}
    for name, content in files.items():
        path = cache / "inductor" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(content + str(time.time_ns()).encode())
    print("init engine (profile, create kv cache, warmup model) took 1.50 s", flush=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({})
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer({"choices": [] if behaviour == "mute" else [{"text": "640."}]})
        def answer(self, value):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())
        def log_message(self, *words):
            pass

    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class BenchLane(CpuLane):
    """Lane `cpu` with a server of its own."""

    def __init__(self) -> None:
        self.behaviour = ""
        self.starts = 0
        self.found: Mapping[str, str] = TOOLCHAIN

    def toolchain(self, python: Path) -> dict[str, str]:
        return dict(self.found)

    def command(
        self,
        target: Target,
        *,
        python: Path,
        model_dir: Path,
        cache_dir: Path,
        served_model_name: str,
        port: int,
        cache_only: bool,
    ) -> ServerCommand:
        self.starts += 1
        program = textwrap.dedent(_SERVER)
        words = (str(port), str(cache_dir), str(model_dir), self.behaviour)
        return ServerCommand((sys.executable, "-c", program, *words), {})


class Bench(yard.Yard):
    """A yard with a stored checkpoint, a plan, and the lane."""

    plan: Plan
    lane: BenchLane

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(home)
        object.__setattr__(self, "plan", self.keep_plan(yard.plan()))
        object.__setattr__(self, "lane", BenchLane())
        for module in ("compile", "measure"):
            monkeypatch.setattr(f"trainyard.steps.{module}.get_lane", lambda name: self.lane)
        self.keep_checkpoint(b"weights")

    def keep_checkpoint(self, weights: bytes) -> None:
        """Store a checkpoint of one file."""
        key = f"{checkpoint_prefix('adder', 'v1')}/model.safetensors"
        stored = self.store.upload(key, io.BytesIO(weights))
        files = (FileEntry(path="model.safetensors", size=stored.size, sha256=stored.sha256),)
        manifest = CheckpointManifest(
            model="adder",
            revision="v1",
            source="file:models",
            files=files,
            digest=files_digest(files),
            architecture_digest="architecture",
            parameters=12,
        )
        create_document(self.store, checkpoint_manifest_key("adder", "v1"), manifest)

    def surroundings(self, name: str, **settings: object) -> StepContext:
        """Return the context of one run of a step."""
        made = Settings.model_validate({"home": self.home, **settings})
        return replace(self.context, settings=made, work_dir=self.home / "work" / name)

    @property
    def said(self) -> list[str]:
        """What the steps reported so far."""
        progress = self.context.progress
        assert isinstance(progress, yard.Silent)
        return progress.said
