"""Releases of the demonstration model, made by real steps in pods, to be served in tests."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from tests.cluster.place import REPOSITORY, Place

from trainyard.documents.artifacts import BundleManifest, CheckpointManifest
from trainyard.documents.plan import Plan
from trainyard.documents.release import Release
from trainyard.releases import release_id_of, store_release
from trainyard.settings import Settings
from trainyard.signing.keys import signing_key
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import bundle_manifest_key, plan_key

MODEL = "adder"
TARGET = "cpu"


@dataclass(frozen=True)
class Yard:
    """A home and a store that pods see too."""

    here: Place
    settings: Settings
    store: FolderStore

    @classmethod
    def make(cls, here: Place, folder: Path) -> Yard:
        """Make an empty one."""
        shutil.copytree(REPOSITORY / "dags" / "models", folder / "models")
        settings = Settings(
            home=folder / "home",
            store=str(folder / "store"),
            catalogue=folder / "models",
            environments=REPOSITORY / "dags" / "environments.yaml",
            serve_python=Path(here.serve_python),
            kubeconfig=here.kubeconfig,
        )
        return cls(here, settings, FolderStore(settings.store_root))

    @property
    def variables(self) -> Mapping[str, str]:
        """The settings, for a pod."""
        names = ("home", "store", "catalogue", "environments", "serve_python")
        return {f"TRAINYARD_{name.upper()}": str(getattr(self.settings, name)) for name in names}

    def train(self, *revisions: str) -> None:
        """Train revisions of the model for a few steps: they add badly, but they are served."""
        models = self.settings.home / "demo" / "models" / MODEL
        for steps, revision in enumerate(revisions, start=2):
            command = ["-m", "trainyard.demo.training", "--out", str(models)]
            self.run(f"train-{revision}", *command, "--revisions", revision, "--steps", str(steps))

    def run(self, name: str, *arguments: str) -> str:
        """Run Python in a pod with this yard's settings; return what it printed."""
        pod_place = replace(self.here, env={**self.here.env, **self.variables})
        return pod_place.run(name, [self.here.serve_python, *arguments])

    def release(self, revision: str) -> Release:
        """Plan, download and compile a revision in pods; sign the release of it, ungated."""
        plan_id = f"plan-{revision}"
        trainyard = ("-m", "trainyard")
        self.run(
            plan_id, *trainyard, "plan", f"--model={MODEL}", f"--revision={revision}",
            f"--plan={plan_id}",
        )  # fmt: skip
        self.run(f"download-{revision}", *trainyard, "download", f"--plan={plan_id}")
        self.run(
            f"compile-{revision}", *trainyard, "compile", f"--plan={plan_id}", f"--target={TARGET}"
        )
        return self._signed(read_document(self.store, plan_key(plan_id), Plan))

    def _signed(self, plan: Plan) -> Release:
        planned = plan.target(TARGET)
        checkpoint = read_document(self.store, plan.checkpoint_key, CheckpointManifest)
        bundle = read_document(self.store, bundle_manifest_key(planned.compile_key), BundleManifest)
        release = Release(
            created_at=datetime.now(UTC),
            release_id=release_id_of(
                MODEL,
                checkpoint_digest=checkpoint.digest,
                compile_key=planned.compile_key,
                serving_digest=planned.serving_digest,
            ),
            model=MODEL,
            target=planned.target,
            lane=planned.target.lane,
            checkpoint_key=plan.checkpoint_key,
            checkpoint_digest=checkpoint.digest,
            revision=plan.revision,
            compile_key=planned.compile_key,
            bundle_digest=bundle.digest,
            serving=planned.serving,
            serving_digest=planned.serving_digest,
            served_model_name=MODEL,
            toolchain=planned.toolchain,
            measurement_id=planned.measurement_id,
            spec=plan.spec,
        )
        return store_release(self.store, release, signing_key(self.settings))[0]
