"""Plans for an environment that takes only what was proven on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tests.neuron_world import TARGETS, NeuronWorld
from tests.unit.proof_files import IMAGE, proof

from trainyard.errors import BadInput
from trainyard.proofs import store_proof
from trainyard.signing.keys import signing_key

pytestmark = pytest.mark.integration

WITH_IMAGE = {"neuron": {**TARGETS["neuron-native"]["neuron"], "image": IMAGE}}


@pytest.fixture
def world(tmp_path: Path) -> NeuronWorld:
    return NeuronWorld(tmp_path, changes=WITH_IMAGE)


def warnings(world: NeuronWorld, **request: object) -> str:
    return "\n".join(world.planned(world.plan(**request)).warnings)


def test_production_refuses_what_nobody_has_proven_and_says_how_to_prove_it(
    world: NeuronWorld,
) -> None:
    with pytest.raises(BadInput, match="nobody has proven lane neuron-native") as caught:
        world.plan(environments=("production",))
    assert "trainyard doctor neuron" in str(caught.value)
    assert "--accept-unproven" in str(caught.value)
    assert "Unproven: " in warnings(world, environments=("staging",))


def test_who_accepts_it_may_go_on_and_the_plan_says_so(world: NeuronWorld) -> None:
    plan = world.plan(environments=("production",), accept_unproven=True)
    assert plan.request.accept_unproven
    assert "Unproven: " in "\n".join(world.planned(plan).warnings)


def test_a_signed_transcript_opens_the_way_and_takes_the_warning_away(world: NeuronWorld) -> None:
    store_proof(world.store, proof(), signing_key(world.settings))
    assert "Unproven: " not in warnings(world, environments=("production",))


def test_one_that_a_stranger_signed_is_named_and_does_not_count(
    world: NeuronWorld, tmp_path: Path
) -> None:
    stranger = world.settings.model_copy(update={"home": tmp_path / "elsewhere"})
    store_proof(world.store, proof(), signing_key(stranger))
    with pytest.raises(BadInput, match=r"(?s)nobody has proven.*does not count"):
        world.plan(environments=("production",))


def test_each_environment_may_decide_for_itself(world: NeuronWorld) -> None:
    path = world.settings.environments
    written = yaml.safe_load(path.read_text())
    written["environments"]["production"]["proven_only"] = False
    written["environments"]["staging"]["proven_only"] = True
    path.write_text(yaml.safe_dump(written))
    world.plan(environments=("production",))
    with pytest.raises(BadInput, match="environment staging takes only what is proven"):
        world.plan(environments=("staging",))


def test_a_model_that_does_not_fit_the_devices_is_refused(tmp_path: Path) -> None:
    blocks = {"neuron": {**TARGETS["neuron-native"]["neuron"], "num_gpu_blocks": 80_000_000}}
    world = NeuronWorld(tmp_path, changes=blocks)
    with pytest.raises(BadInput, match=r"One core of trn2\.48xlarge has 24"):
        world.plan()
