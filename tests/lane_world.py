"""The demonstration model on lane `cpu`, with real vLLM: hardly trained, planned, compiled."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.unit import yard

from trainyard.documents.artifacts import BundleManifest
from trainyard.documents.plan import Plan, ReleaseRequest
from trainyard.lanes.cpu import CpuLane
from trainyard.lanes.protocol import StartProof
from trainyard.serving.process import ServerProcess, free_port
from trainyard.settings import Settings
from trainyard.steps.compile import compile_bundle
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.download import download
from trainyard.steps.plan import plan as make_plan
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import plan_key

REPOSITORY = Path(__file__).parents[1]
PYTHON = REPOSITORY / ".venv-serve" / "bin" / "python"
LANE = CpuLane()


@dataclass(frozen=True)
class LaneYard:
    """A home with an untrained model, a plan for its revision `r1`, and the bundle."""

    settings: Settings
    store: FolderStore
    plan: Plan
    compiled: StepResult

    @property
    def bundle(self) -> BundleManifest:
        return read_document(self.store, self.compiled.key, BundleManifest)

    def surroundings(self, name: str) -> StepContext:
        """Return what a step works in."""
        return StepContext(self.settings, self.store, yard.Silent(), self.settings.work_root / name)

    def weights(self, revision: str = "r1") -> Path:
        """Return the folder of a revision."""
        return self.settings.home / "demo" / "models" / "adder" / revision

    def start(
        self,
        cache_dir: Path,
        *,
        model: Path | None = None,
        cache_only: bool = True,
        **changes: object,
    ) -> ServerProcess:
        """Start a server of the planned target, with some settings changed. It is to be stopped."""
        target = self.plan.target("cpu").target.model_copy(update=changes)
        assert LANE.problems(target) == ()
        port = free_port()
        command = LANE.command(
            target,
            python=PYTHON,
            model_dir=model or self.weights(),
            cache_dir=cache_dir,
            served_model_name="adder",
            port=port,
            cache_only=cache_only,
        )
        log = cache_dir.with_name("server.log")
        return ServerProcess.start(command.argv, command.env, port=port, log_path=log)

    def proof(self, process: ServerProcess, cache_dir: Path, before: frozenset[str]) -> StartProof:
        """Return how a healthy server showed that it started from the bundle, or did not."""
        return LANE.prove_start(
            log=process.log_text(),
            before=before,
            after=LANE.snapshot(cache_dir),
            bundle=self.bundle,
        )


def train(folder: Path, steps: Mapping[str, int]) -> None:
    """Train revisions of the demonstration model for so many steps each, below a new home."""
    models = folder / "home" / "demo" / "models" / "adder"
    for revision, number in steps.items():
        command = ["-m", "trainyard.demo.training", "--out", models, "--revisions", revision]
        subprocess.run(
            [PYTHON, *command, "--steps", str(number)],
            check=True,
            timeout=300,
            stdout=subprocess.DEVNULL,
        )
    shutil.copytree(REPOSITORY / "dags" / "models", folder / "models")


def compile_model(folder: Path) -> LaneYard:
    """Plan, download and compile what was trained in a folder."""
    settings = Settings(
        home=folder / "home",
        catalogue=folder / "models",
        environments=REPOSITORY / "dags" / "environments.yaml",
        serve_python=PYTHON,
    )
    store = FolderStore(settings.store_root)
    context = StepContext(settings, store, yard.Silent(), settings.work_root / "first")
    make_plan(ReleaseRequest(model="adder", revision="r1"), context, plan_id="p1")
    plan = read_document(store, plan_key("p1"), Plan)
    download(plan, context)
    return LaneYard(settings, store, plan, compile_bundle(plan, "cpu", context))
