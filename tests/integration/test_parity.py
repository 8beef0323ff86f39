"""Damage between the checkpoint and the client is stopped by the check that should see it.

Real vLLM, a trained model, and the steps as they are. The server gets other files than the
checkpoint's, as a broken loader, converter or compiler would make them. The short form, with one
start of vLLM, is in `test_cpu_lane.py`; how often a faithful server is stopped, in
`test_behaviour_gate.py`.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.parity_runs import PYTHON, REPOSITORY
from tests.tampered_models import tamper
from tests.unit import yard

from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.plan import Plan, ReleaseRequest
from trainyard.errors import CacheMiss, Refused
from trainyard.lanes.cpu import CpuLane
from trainyard.lanes.protocol import ServerCommand, StartProof
from trainyard.settings import Settings
from trainyard.spec.model import Target
from trainyard.steps import measure as measure_step
from trainyard.steps.compile import compile_bundle
from trainyard.steps.context import StepContext
from trainyard.steps.download import download
from trainyard.steps.gate import gate
from trainyard.steps.measure import measure
from trainyard.steps.plan import plan as make_plan
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import gate_report_key, plan_key, verdict_key

pytestmark = [
    pytest.mark.integration,
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs the serving environment: `make setup`"),
]


class TamperedLane(CpuLane):
    """Lane `cpu` whose server gets another model or number format than the plan says."""

    def __init__(self, model: Path | None = None, *, dtype: str = "", proven: bool = True) -> None:
        self.model, self.dtype, self.proven = model, dtype, proven

    def command(self, target: Target, *, model_dir: Path, **options: Any) -> ServerCommand:
        changed = target.model_copy(update={"dtype": self.dtype} if self.dtype else {})
        return super().command(changed, model_dir=self.model or model_dir, **options)

    def prove_start(self, **found: Any) -> StartProof:
        proof = super().prove_start(**found)
        # With it another number format is stopped here already, because it compiles.
        return proof if self.proven else replace(proof, used_bundle=True)


@dataclass(frozen=True)
class World:
    """A home with a trained revision, its plan and its bundle."""

    settings: Settings
    store: FolderStore
    plan: Plan
    model: Path

    def context(self, name: str) -> StepContext:
        return StepContext(self.settings, self.store, yard.Silent(), self.settings.work_root / name)


def with_short_loads(path: Path) -> None:
    """Let the load levels of a spec be short: what is stopped here is stopped by its answers."""
    spec = yaml.safe_load(path.read_text())
    for level in spec["gates"]["latency"]["levels"]:
        level["num_prompts"] = 8
    path.write_text(yaml.safe_dump(spec, sort_keys=False))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("parity")
    models = folder / "home" / "demo" / "models" / "adder"
    command = [PYTHON, "-m", "trainyard.demo.training", "--out", models, "--revisions", "r1"]
    subprocess.run(command, check=True, timeout=3000, stdout=subprocess.DEVNULL)
    shutil.copytree(REPOSITORY / "dags" / "models", folder / "models")
    with_short_loads(folder / "models" / "adder.yaml")
    settings = Settings(
        home=folder / "home",
        catalogue=folder / "models",
        environments=REPOSITORY / "dags" / "environments.yaml",
        serve_python=PYTHON,
        server_start_timeout_s=3000,
    )
    store = FolderStore(settings.store_root)
    context = StepContext(settings, store, yard.Silent(), settings.work_root / "first")
    make_plan(ReleaseRequest(model="adder", revision="r1"), context, plan_id="p1")
    made = read_document(store, plan_key("p1"), Plan)
    download(made, context)
    compile_bundle(made, "cpu", context)
    return World(settings, store, made, models / "r1")


@pytest.fixture
def measured(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that measures through a lane and judges the accuracy."""

    def measured(lane: CpuLane, name: str) -> tuple[Measurement, GateVerdict]:
        monkeypatch.setattr(measure_step, "get_lane", lambda _: lane)
        key = measure(world.plan, "cpu", world.context(name)).key
        with contextlib.suppress(Refused):
            gate(world.plan, "cpu", "accuracy", world.context(name))
        verdict = read_document(world.store, verdict_key("p1", "cpu", "accuracy"), GateVerdict)
        return read_document(world.store, key, Measurement), verdict

    yield measured
    for folder in ("measurements", "samples", "verdicts", "reports"):
        for entry in list(world.store.list(folder)):
            world.store.delete(entry.key)


def test_a_faithful_server_passes_and_a_second_measurement_reuses_the_reference(
    world: World, measured: Any
) -> None:
    found, verdict = measured(CpuLane(), "faithful")
    assert verdict.outcome == "pass", verdict.summary
    assert not found.parity.reference_reused
    assert world.store.exists(found.parity.reference)
    world.store.delete(f"measurements/{found.measurement_id}.json")
    key = measure(world.plan, "cpu", world.context("again")).key
    again = read_document(world.store, key, Measurement)
    assert again.parity is not None
    assert again.parity.reference_reused
    print(f"faithful: error ratio {found.parity.error_ratio:.3f}, then {again.parity.error_ratio}")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("noisy", "parity: error_ratio"),
        ("swapped_rows", "parity: agreement"),
        ("other_tokenizer", "parity: prompts cut into the reference's tokens"),
    ],
)
def test_other_files_than_the_checkpoint_s_are_stopped(
    world: World, measured: Any, tmp_path: Path, kind: str, expected: str
) -> None:
    _, verdict = measured(TamperedLane(tamper(world.model, tmp_path, kind)), kind)
    broken_checks = {each.what: each.observed for each in verdict.checks if each.outcome == "fail"}
    print(f"{kind}: {broken_checks}")
    assert verdict.outcome == "fail"
    assert expected in broken_checks
    report = world.store.read(gate_report_key("p1", "cpu", "accuracy")).data.decode()
    assert expected.replace("'", "&#39;") in report


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_another_number_format_is_stopped_by_the_start_and_by_parity(
    measured: Any, dtype: str
) -> None:
    with pytest.raises(CacheMiss, match="did not run from its bundle"):
        measured(TamperedLane(dtype=dtype), f"{dtype}-proven")
    found, verdict = measured(TamperedLane(dtype=dtype, proven=False), dtype)
    broken_checks = [each.what for each in verdict.checks if each.outcome == "fail"]
    print(
        f"{dtype}: error ratio {found.parity.error_ratio:.3f}, agreement {found.parity.agreement}"
    )
    assert broken_checks == ["parity: error_ratio"]
