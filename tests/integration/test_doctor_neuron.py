"""`trainyard doctor neuron` with fakes: what it proves, what it finds, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.neuron_world import TARGETS, NeuronWorld
from tests.unit.proof_files import IMAGE
from tests.unit.yard import Silent
from typer.testing import CliRunner

from trainyard import cli
from trainyard.doctor.neuron import STEPS, Wanted, prove
from trainyard.documents.proof import Proof
from trainyard.lanes import neuron_device
from trainyard.proofs import read_proofs
from trainyard.settings import get_settings

pytestmark = pytest.mark.integration
OWN_IMAGE = "registry.example/nxdi:2.28.1"


@pytest.fixture(autouse=True)
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "driver-version"
    path.write_text("2.31.7.0\n")
    monkeypatch.setattr(neuron_device, "VERSION_FILE", path)
    return path


def world_of(tmp_path: Path, lane: str = "neuron-native") -> NeuronWorld:
    image = IMAGE if lane == "neuron-native" else OWN_IMAGE
    return NeuronWorld(tmp_path, lane, {"neuron": {**TARGETS[lane]["neuron"], "image": image}})


def proven(world: NeuronWorld, **wanted: Any) -> Proof:
    return prove(world.settings, Wanted("adder", world.target, **wanted), Silent())


def states(proof: Proof) -> dict[str, str]:
    return {step.name: step.state for step in proof.steps}


def test_a_native_image_is_proven_with_all_that_was_seen(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    proof = proven(world)
    assert [step.name for step in proof.steps] == [*STEPS]
    assert set(states(proof).values()) == {"passed"}
    assert proof.proven
    assert proof.proven_on_cpu
    assert (proof.driver, proof.sdk, proof.image) == ("2.31.7.0", "2.32.0", IMAGE)
    assert proof.feature_bits == ("0x0",)
    seen = {step.name: step.seen for step in proof.steps}
    assert len(seen["compare the keys"]["graphs"]) == 4
    assert seen["measure"]["p50_ms"] > 0
    assert "graph" in seen["a start that lacks code"]["lacked"]
    assert not list(world.store.list("")), "the installation's own store is not touched"
    assert not (world.settings.work_root / "doctor" / f"adder-{world.target}").exists()


def test_an_nxdi_image_is_proven_without_a_cpu_compile(tmp_path: Path) -> None:
    proof = proven(world_of(tmp_path, "neuron-nxdi"))
    assert proof.proven
    assert not proof.proven_on_cpu
    assert states(proof)["compile on a CPU"] == "skipped"
    assert states(proof)["a start that lacks code"] == "passed"


def test_a_cpu_that_makes_other_graphs_leaves_only_that_unproven(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.serving.behave(cpu_salt="another path of the compiler")
    proof = proven(world)
    assert states(proof)["compare the keys"] == "failed"
    assert proof.proven
    assert not proof.proven_on_cpu


@pytest.mark.parametrize(
    ("behaviour", "step", "words"),
    [
        ({"fail_at": 1}, "compile on the device", "NCC_EVRF009"),
        ({"compiles_anyway": True}, "a start that lacks code", "started all the same"),
        ({"drains": False}, "drain", "was lost"),
    ],
)
def test_what_does_not_work_is_named_and_nothing_is_proven(
    tmp_path: Path, behaviour: dict[str, Any], step: str, words: str
) -> None:
    world = world_of(tmp_path)
    world.serving.behave(**behaviour)
    proof = proven(world)
    assert not proof.proven
    (found,) = [each for each in proof.steps if each.name == step]
    assert found.state == "failed"
    assert words in found.detail
    assert [each.name for each in proof.steps] == [*STEPS], "the rest is told as not tried"
    left = world.settings.work_root / "doctor" / f"adder-{world.target}"
    assert not (left / "store").exists(), "the next run begins anew"
    assert list(left.glob("work/*/server.log")), "its logs can be read"


def test_nothing_new_is_begun_after_the_time_is_over(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    seconds = iter(range(0, 100_000, 100))
    proof = prove(
        world.settings,
        Wanted("adder", world.target, max_s=350),
        Silent(),
        clock=lambda: float(next(seconds)),
    )
    assert not proof.proven
    assert any("are over" in step.detail for step in proof.steps)


class TestCommand:
    @pytest.fixture
    def world(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NeuronWorld:
        world = world_of(tmp_path)
        for name in ("home", "catalogue", "environments", "serve_python"):
            monkeypatch.setenv(f"TRAINYARD_{name.upper()}", str(getattr(world.settings, name)))
        get_settings.cache_clear()
        return world

    def run(self, *words: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, ["doctor", "neuron", "adder", *words])
        return result.exit_code, result.output

    def test_the_signed_transcript_opens_production(
        self, world: NeuronWorld, tmp_path: Path
    ) -> None:
        code, text = self.run("--out", str(tmp_path / "transcript.json"))
        assert code == 0, text
        assert "is proven" in text
        (proof,) = read_proofs(world.store, world.settings).proofs
        assert proof.proven
        assert (tmp_path / "transcript.json").stat().st_size > 1000
        assert world.plan(environments=("production",)).plan_id

    def test_without_a_device_or_an_image_nothing_is_tried(
        self, world: NeuronWorld, driver: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TRAINYARD_IMAGE", "registry.example/another:1")
        get_settings.cache_clear()
        code, text = self.run()
        assert (code, "names" in text) == (10, True)
        driver.unlink()
        code, text = self.run()
        assert (code, "no Neuron driver" in text) == (10, True)

    def test_a_failure_is_stored_too_and_exits_with_20(self, world: NeuronWorld) -> None:
        world.serving.behave(code="NCC_EVRF009", fail_at=0)
        code, text = self.run("--target", world.target)
        assert (code, "is not proven" in text) == (20, True)
        (proof,) = read_proofs(world.store, world.settings).proofs
        assert not proof.proven
        assert self.run("--target", "nowhere")[0] == 10
